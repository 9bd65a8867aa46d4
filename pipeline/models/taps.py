"""What the alignment reads from a student, and what a student returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
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


class QueriesKeys(NamedTuple):
    """What a tapped block attends with. No copies: the attention's own operands."""

    queries: Tensor
    """(B, heads, N, d)."""
    keys: Tensor
    """(B, heads, N, d)."""

    @property
    def logits(self) -> Tensor:
        """q k^T / sqrt(d), before the softmax: (B, heads, N, N), float32."""
        return attention_logits(self.queries, self.keys)


def attention_logits(q_BHNd: Tensor, k_BHNd: Tensor) -> Tensor:
    """q k^T / sqrt(d): (B, H, N, N), float32, multiplied in the operands' own dtype."""
    return ((q_BHNd * q_BHNd.shape[-1] ** -0.5) @ k_BHNd.transpose(-2, -1)).float()


class StudentOutput(NamedTuple):
    """One forward pass (B samples, N tokens, D width)."""

    prediction: Tensor
    """(B, C, h, w) SiT's velocity; (B, 2 C, h, w) DiT's noise, then variance."""
    features: Tensor | None
    """(B, N, D) tokens that leave the block at the feature depth."""
    attended: tuple[QueriesKeys, ...]
    """Of each tapped block."""

    @property
    def attention_logits(self) -> Tensor | None:
        """(B, L, heads, N, N) q k^T / sqrt(d) of the tapped blocks, before the softmax, float32;
        computed when asked for."""
        if not self.attended:
            return None
        return torch.stack([one.logits for one in self.attended], dim=1)

    @property
    def velocity(self) -> Tensor:
        """The prediction of a SiT."""
        return self.prediction
