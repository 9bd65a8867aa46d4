"""Taps of a student and its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Taps:
    """Tensors of a student that the alignment reads. Nothing is computed for other places."""

    feature_depth: int | None = None
    """1-based block whose output tokens are returned."""
    attention_layers: tuple[int, ...] = ()
    """0-based blocks whose queries and keys are returned."""
    heads: int = 0
    """Number of heads of those blocks, from the first."""
    other_depths: tuple[int, ...] = ()
    """Further 1-based blocks whose output tokens are returned, lowest first."""


class QueriesKeys(NamedTuple):
    """Operands of the attention of a tapped block, not copied."""

    queries: Tensor
    """(B, heads, N, d)."""
    keys: Tensor
    """(B, heads, N, d)."""

    def patches(self) -> QueriesKeys:
        """Without the class token at index 0."""
        return QueriesKeys(self.queries[:, :, 1:], self.keys[:, :, 1:])

    @property
    def logits(self) -> Tensor:
        """q k^T / sqrt(d), before the softmax: (B, heads, N, N), float32."""
        return attention_logits(self.queries, self.keys)


def attention_logits(q_BHNd: Tensor, k_BHNd: Tensor) -> Tensor:
    """q k^T / sqrt(d): (B, H, N, N), float32, multiplied in the dtype of the operands."""
    return ((q_BHNd * q_BHNd.shape[-1] ** -0.5) @ k_BHNd.transpose(-2, -1)).float()


class StudentOutput(NamedTuple):
    """One forward pass (B samples, N tokens, D width)."""

    prediction: Tensor
    """SiT: velocity (B, C, h, w). DiT: noise, then variance (B, 2 C, h, w)."""
    features: Tensor | None
    """(B, N, D) output tokens of the block at the feature depth; None without that tap. With a
    class token (B, 1 + N, D): it precedes the patches."""
    attended: tuple[QueriesKeys, ...]
    """Queries and keys of the patches in each tapped block."""
    other_features: tuple[Tensor, ...] = ()
    """Output tokens of the blocks at the other depths, as ``features``."""
    class_prediction: Tensor | None = None
    """(B, E) velocity of the class token; None without one."""

    @property
    def attention_logits(self) -> Tensor | None:
        """(B, L, heads, N, N) q k^T / sqrt(d) of the tapped blocks, before the softmax, float32;
        computed at each access. None without tapped blocks."""
        if not self.attended:
            return None
        return torch.stack([pair.logits for pair in self.attended], dim=1)
