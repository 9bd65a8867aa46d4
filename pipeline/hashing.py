"""SHA-256 of arrays and of weights: names, dtypes, shapes and values."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def sha256_of_arrays(items: Any) -> str:
    """SHA-256 over an iterable of (name, numpy array), names, dtypes and shapes included."""
    digest = hashlib.sha256()
    for name, array in items:
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def sha256_of_module(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, on any device."""
    tensors = sorted(module.state_dict().items())
    return sha256_of_arrays((name, tensor.cpu().numpy()) for name, tensor in tensors)
