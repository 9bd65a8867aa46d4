"""Tensors of token vectors as integers of a chosen fineness, to be entropy-coded.

An entropy coder spends bits on what numbers are frequent, not on the widest of them, so steps
follow what an error does to the loss, not a tensor's largest number. Codes are kept as two planes
of bytes: the high one is nearly constant and all but vanishes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.store.codecs.base import MAIN, Array, Shape

if TYPE_CHECKING:
    from torch import Tensor

MAX_CODE = 32_000  # of a code: within 16 bits with room for rounding
HALF_MAX = 65_504.0  # the largest float16


@dataclass(frozen=True)
class PerTokenQuantiser:
    """x = centre + step * code: a step for each token, a centre for each channel.

    ``spread``: a token's step is proportional to its root mean square, because the layer norm that
    reads it divides by just that. The centre, each channel's median over the sample's tokens, takes
    off what DINOv2 holds in every token; the median is not moved by its few loud tokens. A token
    that is nearer to zero than to the centre is stored as it is, which a negative step tells.

    ``relative`` to the sample's typical spread around its centre, ``fineness`` is about the
    standard deviation of the codes, whatever the teacher: its size in bits, so to say. Otherwise it
    is the root mean square of a token in steps, and the cosine between a token and what comes back
    is about 1 - 1 / (24 fineness^2).
    """

    fineness: int
    relative: bool

    def arrays(self, shape: Shape) -> dict[str, Array]:
        if len(shape) != 2 or not all(shape):
            raise ValueError(f"it is for tokens x channels, not for shape {shape}")
        tokens, width = shape
        return {
            MAIN: Array(np.dtype("|u1"), (2, tokens, width)),
            "step": Array(np.dtype("<f4"), (tokens,)),
            "centre": Array(np.dtype("<f2"), (width,)),
        }

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        x = values.double()  # squares of float32's range
        centre = x.median(1, keepdim=True).values.clamp(-HALF_MAX, HALF_MAX).half()
        apart = x - centre
        rms = x.square().mean(-1, keepdim=True).sqrt()
        centred = apart.square().mean(-1, keepdim=True).sqrt() <= rms
        apart = apart.where(centred, x)
        step = rms / self.fineness
        if self.relative:
            spread = apart.abs().mean(-1, keepdim=True) / rms.clamp_min(1e-300)
            step = step * 1.25 * spread.median(1, keepdim=True).values  # 1.25: a normal's std
        step = step.maximum(apart.abs().amax(-1, keepdim=True) / MAX_CODE).float()
        step = step.where(step > 0, 1.0)
        return {
            MAIN: _planes((apart / step).round(), 1),
            "step": step.where(centred, -step).squeeze(-1),
            "centre": centre.squeeze(1),
        }

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        step = arrays["step"].unsqueeze(-1)
        centre = arrays["centre"].float().unsqueeze(1).where(step > 0, 0.0)
        return centre + _codes(arrays[MAIN], 1) * step.abs()


@dataclass(frozen=True)
class HeadSteps:
    """Queries or keys (layers, heads, tokens, d), with one step for each head: its root mean square
    over ``fineness``. Logits are products of all tokens with all: no token's error weighs more."""

    fineness: int

    def arrays(self, shape: Shape) -> dict[str, Array]:
        if len(shape) != 4 or not all(shape):
            raise ValueError(f"it is for layers x heads x tokens x d, not for shape {shape}")
        layers, heads, tokens, width = shape
        return {
            MAIN: Array(np.dtype("|u1"), (layers, heads, 2, tokens, width)),
            "step": Array(np.dtype("<f4"), (layers, heads)),
        }

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        x = values.double()
        step = x.square().mean((-2, -1), keepdim=True).sqrt() / self.fineness
        step = step.maximum(x.abs().amax((-2, -1), keepdim=True) / MAX_CODE).float()
        step = step.where(step > 0, 1.0)
        return {MAIN: _planes((x / step).round(), -3), "step": step[..., 0, 0]}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return _codes(arrays[MAIN], -3) * arrays["step"][..., None, None]


def _planes(codes: Tensor, dim: Literal[1, -3]) -> Tensor:
    """Integers of 16 bits as their low and high bytes, stacked at ``dim``. The shift by 128 makes
    the high byte of small codes 0, be they positive or negative."""
    import torch

    shifted = codes.int() + 128
    return torch.stack([shifted & 255, shifted >> 8 & 255], dim).byte()


def _codes(planes: Tensor, dim: Literal[1, -3]) -> Tensor:
    low, high = planes.unbind(dim)
    return low.float() + 256.0 * high.char().float() - 128.0
