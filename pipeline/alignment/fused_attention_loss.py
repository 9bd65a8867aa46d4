"""The attention loss without the attention maps: from queries and keys, a few rows at a time."""

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
    """``attention_loss`` of the logits that L layers' queries and keys give, and its gradient,
    without keeping a map for the backward pass: (B,), float32.

    With rows of the teacher that sum to 1, the cross-entropy of a row is
    ``logsumexp(z) - <p, z>`` and its gradient ``softmax(z) - p``; the logits z = q k^T / sqrt(d)
    are computed once on the way forward and once more on the way back, which is cheaper than to
    write and read what autograd keeps of them (four maps for each layer and head). ``compiled``:
    what is done to the logits becomes one kernel.
    """
    rows = compiled_rows() if compiled else PLAIN
    losses = [
        _AttentionLoss.apply(*pair, teacher_probs_BLHNN[:, number], rows)
        for number, pair in enumerate(attended)
    ]
    return torch.stack(losses).mean(0)


class _AttentionLoss(torch.autograd.Function):
    """One layer: queries and keys (B, H, N, d), probabilities (B, H, N, N) -> (B,)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, probs: Tensor, rows: Rows) -> Tensor:
        normalisers = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        losses = torch.empty(len(q), dtype=torch.float32, device=q.device)
        # autocast ends before the backward pass, which must compute the same logits
        with torch.autocast(q.device.type, enabled=False):
            for part in _parts(q):
                losses[part], normalisers[part] = rows.loss(q[part], k[part], probs[part])
        ctx.save_for_backward(q, k, probs, normalisers)
        ctx.rows = rows
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, probs, normalisers = ctx.saved_tensors
        (grad,) = grads
        grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
        for part in _parts(q):
            grad_q[part], grad_k[part] = ctx.rows.gradient(
                q[part], k[part], probs[part], normalisers[part], grad[part]
            )
        return grad_q, grad_k, None, None


def _parts(q: Tensor) -> Iterator[slice]:
    """On a CPU one sample at a time, whose maps stay in its cache; on a GPU all at once."""
    size = 1 if q.device.type == "cpu" else max(1, len(q))
    return (slice(begin, begin + size) for begin in range(0, len(q), size))


def rows_loss(q: Tensor, k: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """The loss (B,) and each row's logsumexp (B, H, N)."""
    logits = attention_logits(q, k)
    normalisers = torch.logsumexp(logits, dim=-1)
    fitted = (logits * probs).sum(-1)
    return (normalisers - fitted).flatten(1).mean(1), normalisers


def rows_gradient(
    q: Tensor, k: Tensor, probs: Tensor, normalisers: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys, in their dtype, from that of the loss (B,)."""
    error = (attention_logits(q, k) - normalisers.unsqueeze(-1)).exp_().sub_(probs)
    rows = q.shape[1] * q.shape[2]
    error = error.mul_((grad / rows).view(-1, 1, 1, 1)).to(q.dtype)
    scale = q.shape[-1] ** -0.5
    return (error @ k) * scale, error.transpose(-2, -1) @ (q * scale)


class Rows(NamedTuple):
    """``rows_loss`` and ``rows_gradient``, as they stand or compiled."""

    loss: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., tuple[Tensor, Tensor]]


PLAIN = Rows(rows_loss, rows_gradient)


@cache
def compiled_rows() -> Rows:
    return Rows(torch.compile(rows_loss), torch.compile(rows_gradient))
