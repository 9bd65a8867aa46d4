"""What the alignment reads from a student, and what a student returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Taps:
    """Places in a student; nothing is computed for places that are not named."""

    feature_depth: int | None = None
    """1-based: the tokens that leave this block."""
    attention_layers: tuple[int, ...] = ()
    """0-based blocks whose attention logits are computed."""
    heads: int = 0
    """The first so many heads of those blocks."""


class StudentOutput(NamedTuple):
    """One forward pass (B samples, N tokens, D width)."""

    prediction: Tensor
    """(B, C, h, w) SiT's velocity; (B, 2 C, h, w) DiT's noise, then variance."""
    features: Tensor | None
    """(B, N, D) tokens that leave the block at the feature depth."""
    attention_logits: Tensor | None
    """(B, L, heads, N, N) q k^T / sqrt(d) of the tapped blocks, before the softmax, float32."""

    @property
    def velocity(self) -> Tensor:
        """The prediction of a SiT."""
        return self.prediction
