"""Interface of the networks that turn images into features."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class NetworkOutput(NamedTuple):
    """Outputs of a network for B images, each float32."""

    features: Tensor
    """(B, D)."""
    spatial: Tensor | None = None
    """(B, E): features of a layer with spatial positions, where defined (Inception)."""
    logits: Tensor | None = None
    """(B, C): logits of the classes for the Inception score, where defined (Inception)."""


class Network(Protocol):
    """Interface of ``FeatureNetwork`` and ``InceptionNetwork``."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    def extract(self, images_B3RR: Tensor) -> NetworkOutput: ...


def full_precision() -> Any:
    """Context without TF32 in convolutions: torch's default, TF32, changes the third digit of an
    FID."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
