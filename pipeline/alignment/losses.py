"""Alignment losses of HASTE (arXiv 2505.16792, sections 2.1 and 2.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Targets(NamedTuple):
    """Targets of one batch on the training device; None if the loss is disabled."""

    features: Tensor | None
    """(B, N, D_teacher)."""
    attention: Tensor | None
    """(B, L, H, N, N) probabilities, rows summing to 1, float32."""


def feature_loss(projected_BND: Tensor, teacher_BND: Tensor) -> Tensor:
    """Negative cosine between projected student tokens and teacher tokens, mean over tokens: (B,).

    Computed in float32, because half-precision norms overflow.
    """
    cosine = F.cosine_similarity(projected_BND.float(), teacher_BND.float(), dim=-1, eps=1e-12)
    return -cosine.mean(1)


def attention_loss(student_logits_BLHNN: Tensor, teacher_probs_BLHNN: Tensor) -> Tensor:
    """Cross-entropy from the teacher's attention rows to the student's, mean over layers, heads
    and queries: (B,). The softmax over keys is applied to the logits here; the teacher's rows are
    already normalised."""
    log_probs = torch.log_softmax(student_logits_BLHNN.float(), dim=-1)
    return -(teacher_probs_BLHNN * log_probs).sum(-1).flatten(1).mean(1)


def attention_entropy(probs_BLHNN: Tensor) -> Tensor:
    """Entropy of attention rows in nats, mean over layers, heads and queries: (B,)."""
    return torch.special.entr(probs_BLHNN).sum(-1).flatten(1).mean(1)
