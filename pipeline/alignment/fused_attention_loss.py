"""Attention loss computed from queries and keys without storing attention maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.models.taps import QueriesKeys, attention_logits


def fused_attention_loss(
    attended: Sequence[QueriesKeys], teacher_probs_BLHNN: Tensor, *, compiled: bool = False
) -> Tensor:
    """``attention_loss`` of the logits of L layers, without saving a map for the backward pass:
    (B,), float32.

    ``teacher_probs`` (B, L, H, N, N): because its rows sum to 1, the cross-entropy of a row is
    ``logsumexp(z) - <p, z>`` and its gradient ``softmax(z) - p``. The logits z = q k^T / sqrt(d)
    are computed in the forward pass and again in the backward pass, which is cheaper than writing
    and reading the four maps per layer and head that autograd would save. ``compiled``: the
    element-wise operations on the logits are fused into one kernel.
    """
    rows = compiled_rows() if compiled else PLAIN
    losses = [
        _AttentionLoss.apply(*pair, teacher_probs_BLHNN[:, layer], rows)
        for layer, pair in enumerate(attended)
    ]
    return torch.stack(losses).mean(0)


class _AttentionLoss(torch.autograd.Function):
    """One layer: queries and keys (B, H, N, d), probabilities (B, H, N, N) -> losses (B,)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, probs: Tensor, rows: Rows) -> Tensor:
        normalisers = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        losses = torch.empty(len(q), dtype=torch.float32, device=q.device)
        # autocast is off in the backward pass, which must compute the same logits
        with torch.autocast(q.device.type, enabled=False):
            for samples in _batch_slices(q):
                losses[samples], normalisers[samples] = rows.loss(
                    q[samples], k[samples], probs[samples]
                )
        ctx.save_for_backward(q, k, probs, normalisers)
        ctx.rows = rows
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, probs, normalisers = ctx.saved_tensors
        (grad,) = grads
        grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
        for samples in _batch_slices(q):
            grad_q[samples], grad_k[samples] = ctx.rows.gradient(
                q[samples], k[samples], probs[samples], normalisers[samples], grad[samples]
            )
        return grad_q, grad_k, None, None


def _batch_slices(q: Tensor) -> Iterator[slice]:
    """Single samples on a CPU, so that their maps stay in its cache; the whole batch on a GPU."""
    size = 1 if q.device.type == "cpu" else max(1, len(q))
    return (slice(begin, begin + size) for begin in range(0, len(q), size))


def rows_loss(q: Tensor, k: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (B,) and logsumexp of each row (B, H, N)."""
    logits = attention_logits(q, k)
    normalisers = torch.logsumexp(logits, dim=-1)
    expected = (logits * probs).sum(-1)
    return (normalisers - expected).flatten(1).mean(1), normalisers


def rows_gradient(
    q: Tensor, k: Tensor, probs: Tensor, normalisers: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys in their dtype, from ``grad``, that of the loss (B,)."""
    error = (attention_logits(q, k) - normalisers.unsqueeze(-1)).exp_().sub_(probs)
    rows = q.shape[1] * q.shape[2]
    error = error.mul_((grad / rows).view(-1, 1, 1, 1)).to(q.dtype)
    scale = q.shape[-1] ** -0.5
    return (error @ k) * scale, error.transpose(-2, -1) @ (q * scale)


class Rows(NamedTuple):
    """``rows_loss`` and ``rows_gradient``, eager or compiled."""

    loss: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., tuple[Tensor, Tensor]]


PLAIN = Rows(rows_loss, rows_gradient)


@cache
def compiled_rows() -> Rows:
    return Rows(torch.compile(rows_loss), torch.compile(rows_gradient))
