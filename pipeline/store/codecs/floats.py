"""Codecs that store each number in a numpy dtype or in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pipeline.store.codecs.base import MAIN, STORED_AS_IS, Array, Shape
from schemas.codecs import Lossless

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """One array of a numpy dtype."""

    dtype: str
    family = STORED_AS_IS
    levels = 0
    bits_per_value = None
    lossless: ClassVar[Lossless] = "none"

    def arrays(self, shape: Shape) -> dict[str, Array]:
        return {MAIN: Array(np.dtype(self.dtype), shape)}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        import torch

        return {MAIN: values.to(getattr(torch, np.dtype(self.dtype).name))}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays[MAIN]


class BFloat16:
    """bfloat16, its bit patterns stored as uint16 because numpy and zarr have no bfloat16."""

    family = STORED_AS_IS
    levels = 0
    bits_per_value = 13.7
    lossless: ClassVar[Lossless] = "blosc"

    def arrays(self, shape: Shape) -> dict[str, Array]:
        return {MAIN: Array(np.dtype("<u2"), shape)}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        import torch

        return {MAIN: values.bfloat16().view(torch.uint16)}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        import torch

        return arrays[MAIN].view(torch.bfloat16).float()
