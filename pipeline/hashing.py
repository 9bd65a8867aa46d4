"""SHA-256 of arrays and of weights: names, dtypes, shapes and values."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn

from pipeline.models import SiT


def sha256_of_arrays(items: Any) -> str:
    """SHA-256 over an iterable of (name, numpy array), names, dtypes and shapes included."""
    digest = hashlib.sha256()
    for name, array in items:
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def sha256_of_weights(student: SiT) -> str:
    """Of a student's, wherever it is."""
    tensors = sorted(student.state_dict().items())
    return sha256_of_arrays((name, tensor.cpu().numpy()) for name, tensor in tensors)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights on the CPU."""
    return sha256_of_arrays(
        (name, tensor.numpy()) for name, tensor in sorted(model.state_dict().items())
    )
