"""Read the attention logits of a block while timm's own code runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AttentionOperands(NamedTuple):
    """Operands of one call of torch's attention (T tokens, prefix tokens included)."""

    q: Tensor
    """(B, H, T, d), after query norm and rotary embedding if the model has them."""
    k: Tensor
    """(B, H, T, d)."""
    v: Tensor
    """(B, H, T, d)."""
    scale: float
    """Factor of q k^T."""
    plain: bool
    """True if the output is softmax(scale q k^T) v: no mask, no dropout, not causal."""

    def patches(self, prefix: int) -> tuple[Tensor, Tensor]:
        """Scaled queries and keys of the patches, the tokens after the ``prefix`` first ones: each
        (B, H, N, d), float32. Their product is the logits."""
        return self.q[:, :, prefix:].float() * self.scale, self.k[:, :, prefix:].float()

    def logits(self, prefix: int, heads: int | None = None) -> Tensor:
        """scale q k^T of the patches for the first ``heads`` heads: (B, H, N, N), float32."""
        query, key = self.patches(prefix)
        return qk_logits(query[:, :heads], key[:, :heads])


def qk_logits(query: Tensor, key: Tensor) -> Tensor:
    """q k^T of two (..., N, d) tensors, in float32 even under autocast: (..., N, N)."""
    with torch.autocast(query.device.type, enabled=False):
        return query @ key.transpose(-2, -1)


class AttentionTap(TorchFunctionMode):
    """Records the operands of every ``scaled_dot_product_attention`` call while it is entered.

    All of timm's fused attention ends in this call, after norms, rotary embedding and shared key
    heads, so the recorded operands are exactly those that the model uses. Only references are
    stored; ``AttentionOperands.logits`` computes the logits on demand.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[AttentionOperands] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls.append(_operands(*args, **kwargs))
        return func(*args, **kwargs)


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionOperands:
    plain = attn_mask is None and not dropout_p and not is_causal and q.shape == k.shape
    return AttentionOperands(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, plain)
