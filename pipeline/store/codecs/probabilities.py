"""Probabilities in 8 bits.

A linear scale would round small probabilities to 0, which the cross-entropy weighs by their ratio;
roots spend the levels on them. Rows are normalised on decoding, so that no scale is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.store.codecs.base import MAIN, Array, Shape

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 255
TINY = 1e-30


class CubeRoot:
    """The cube root of a probability's ratio to its row's largest, in 256 levels: the most faithful
    form in 8 bits."""

    def arrays(self, shape: Shape) -> dict[str, Array]:
        return _bytes_of(shape)

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
    """The square root of a probability in steps of 1 / ``levels``, wider where a row's largest
    would need more than 8 bits: the smallest form once it is entropy-coded.

    With equal steps of the root all probabilities add the same to the divergence, about
    n / (6 levels^2) nats for a row of n. What rounds to nothing comes back as a third of a step,
    since its logarithm counts.
    """

    levels: int

    def arrays(self, shape: Shape) -> dict[str, Array]:
        return _bytes_of(shape)

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        root = values.float().clamp_min(0).sqrt()
        largest = root.amax(-1, keepdim=True).clamp_min(TINY)
        return {MAIN: (root * (LEVELS / largest).clamp_max(self.levels)).round().byte()}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        squares = arrays[MAIN].float().clamp_min(0.3).square()
        return squares / squares.sum(-1, keepdim=True)


def _bytes_of(shape: Shape) -> dict[str, Array]:
    if not shape:
        raise ValueError("it is for rows of probabilities, not for scalars")
    return {MAIN: Array(np.dtype("|u1"), shape)}
