"""The interface of networks that turn images into features."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Extracted(NamedTuple):
    """What a network says of B images, each float32."""

    features: Tensor
    """(B, D)."""
    spatial: Tensor | None = None
    """(B, E) of a layer that still knows places, where the network defines one (Inception)."""
    logits: Tensor | None = None
    """(B, C) of the classes that a score is defined on (Inception)."""


class Network(Protocol):
    """``FeatureNetwork`` and ``InceptionNetwork`` are such."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    def extract(self, images_B3RR: Tensor) -> Extracted: ...


def full_precision() -> Any:
    """cuDNN's TF32, torch's default for convolutions, moves an FID in its third digit."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
