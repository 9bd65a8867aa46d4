"""Codecs for rows of probabilities: 8 bits per value.

The cross-entropy weighs small probabilities by their ratio, and a linear scale would round them to
0; roots spend more levels on them. No scale is stored, because decoding normalises rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pipeline.store.codecs.base import MAIN, Array, Shape
from schemas.codecs import Lossless

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 255
TINY = 1e-30


class CubeRoot:
    """The cube root of a probability's ratio to the largest one of its row, in 256 levels: the most
    accurate codec with 8 bits."""

    family = "sqrt"
    levels = 1000  # the divergence on the demo's maps is that of SquareRoot(1000)
    bits_per_value = 7.45
    lossless: ClassVar[Lossless] = "zstd"

    def arrays(self, shape: Shape) -> dict[str, Array]:
        return _one_byte_each(shape)

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        rows = values.float()
        largest = rows.amax(-1, keepdim=True).clamp_min(TINY)
        root = (rows / largest).clamp_min(0).pow(1 / 3)
        return {MAIN: (root * LEVELS).round().byte()}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        cubes = (arrays[MAIN].float() / LEVELS).pow(3)
        return cubes / cubes.sum(-1, keepdim=True).clamp_min(TINY)


@dataclass(frozen=True)
class SquareRoot:
    """The square root of a probability in steps of 1 / ``levels``, wider where the largest value of
    a row would need more than 8 bits: the smallest codec after entropy coding.

    With equal steps of the root all probabilities contribute equally to the divergence, about
    n / (6 levels^2) nats for a row of n. A value rounded to zero is decoded as 0.3 of a step,
    because the loss takes its logarithm.
    """

    levels: int
    family = "sqrt"
    lossless: ClassVar[Lossless] = "zstd"

    @property
    def bits_per_value(self) -> float:
        return math.log2(self.levels) - 3.4  # square roots of probabilities are mostly small

    def arrays(self, shape: Shape) -> dict[str, Array]:
        return _one_byte_each(shape)

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        root = values.float().clamp_min(0).sqrt()
        largest = root.amax(-1, keepdim=True).clamp_min(TINY)
        return {MAIN: (root * (LEVELS / largest).clamp_max(self.levels)).round().byte()}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        squares = arrays[MAIN].float().clamp_min(0.3).square()
        return squares / squares.sum(-1, keepdim=True)


def _one_byte_each(shape: Shape) -> dict[str, Array]:
    if not shape:
        raise ValueError("it is for rows of probabilities, not for scalars")
    return {MAIN: Array(np.dtype("|u1"), shape)}
