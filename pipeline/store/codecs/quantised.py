"""Codecs for token vectors: uniform quantisation with a chosen step, for entropy coding.

The size after entropy coding depends on the distribution of codes, not on their range. So steps
follow the effect of an error on the loss, not a tensor's largest number. Codes are stored as two
planes of bytes; the high one is nearly constant and compresses to almost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pipeline.store.codecs.base import MAIN, Array, Shape
from schemas.codecs import Lossless

if TYPE_CHECKING:
    from torch import Tensor

MAX_CODE = 32_000  # within 16 bits, with room for rounding
HALF_MAX = 65_504.0  # the largest float16
NORMAL_BITS = 0.5 * math.log2(2 * math.pi * math.e)  # entropy of a normal number of std 1 step


@dataclass(frozen=True)
class PerTokenQuantiser:
    """x = centre + step * code: a step for each token, a centre for each channel.

    A token's step is proportional to its root mean square (RMS), because the layer norm that reads
    the token divides by it. The centre, each channel's median over the sample's tokens, removes
    values that DINOv2 has in every token; its few tokens of large norm do not move a median. A
    token nearer to zero than to the centre is stored without it, marked by a negative step.

    ``levels`` is the RMS of a token in steps; the cosine between a token and its decoded values is
    about 1 - 1 / (24 levels^2). With ``relative`` it is instead the typical spread of the sample's
    tokens around the centre in steps: about the standard deviation of the codes, whatever the
    teacher, and so a measure of the stored size.
    """

    levels: int
    relative: bool
    lossless: ClassVar[Lossless] = "zstd"

    @property
    def family(self) -> str:
        return "tokens" if self.relative else "rms"

    @property
    def bits_per_value(self) -> float:
        # Without ``relative`` the codes spread less than ``levels``, as the centre is subtracted.
        return (1.04 if self.relative else 0.9) * (math.log2(self.levels) + NORMAL_BITS)

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
        codes, others = self.quantise(values)
        return {MAIN: self.with_codes(codes), **others}

    def quantise(self, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The codes (B, T, D), integers within 16 bits, and the other arrays."""
        x = values.double()  # squares of float32 values overflow float32
        centre = x.median(1, keepdim=True).values.clamp(-HALF_MAX, HALF_MAX).half()
        apart = x - centre
        rms = x.square().mean(-1, keepdim=True).sqrt()
        centred = apart.square().mean(-1, keepdim=True).sqrt() <= rms
        apart = apart.where(centred, x)
        step = rms / self.levels
        if self.relative:
            spread = apart.abs().mean(-1, keepdim=True) / rms.clamp_min(1e-300)
            step = step * 1.25 * spread.median(1, keepdim=True).values  # std of a normal / mean |x|
        step = step.maximum(apart.abs().amax(-1, keepdim=True) / MAX_CODE).float()
        step = step.where(step > 0, 1.0)
        others = {"step": step.where(centred, -step).squeeze(-1), "centre": centre.squeeze(1)}
        return (apart / step).round(), others

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self.dequantise(self.codes(arrays), arrays)

    def dequantise(self, codes: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """The numbers (B, T, D) of codes and the other arrays."""
        step = arrays["step"].unsqueeze(-1)
        centre = arrays["centre"].float().unsqueeze(1).where(step > 0, 0.0)
        return centre + codes * step.abs()

    def codes(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The codes (B, T, D) of stored arrays, as any numbers."""
        return _codes(arrays[MAIN], 1)

    def with_codes(self, codes: Tensor) -> Tensor:
        """``MAIN`` of codes (B, T, D)."""
        return _planes(codes, 1)


@dataclass(frozen=True)
class PerHeadQuantiser:
    """Queries or keys (layers, heads, tokens, d) with one step for each head: its RMS divided by
    ``levels``. All tokens share a step because logits multiply every token with every other, so
    that no token's error weighs more."""

    levels: int
    family = "heads"
    lossless: ClassVar[Lossless] = "zstd"

    @property
    def bits_per_value(self) -> float:
        return math.log2(self.levels) + NORMAL_BITS

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
        step = x.square().mean((-2, -1), keepdim=True).sqrt() / self.levels
        step = step.maximum(x.abs().amax((-2, -1), keepdim=True) / MAX_CODE).float()
        step = step.where(step > 0, 1.0)
        return {MAIN: _planes((x / step).round(), -3), "step": step[..., 0, 0]}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return _codes(arrays[MAIN], -3) * arrays["step"][..., None, None]


def _planes(codes: Tensor, dim: Literal[1, -3]) -> Tensor:
    """Low and high bytes of 16-bit integers, stacked at ``dim``. The shift by 128 makes the high
    byte of small codes 0, whatever their sign."""
    import torch

    shifted = codes.int() + 128
    return torch.stack([shifted & 255, shifted >> 8 & 255], dim).byte()


def _codes(planes: Tensor, dim: Literal[1, -3]) -> Tensor:
    low, high = planes.unbind(dim)
    return low.float() + 256.0 * high.char().float() - 128.0
