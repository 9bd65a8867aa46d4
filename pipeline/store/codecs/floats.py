"""Numbers stored as they are, or rounded one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.store.codecs.base import MAIN, Array, Shape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """One array of a numpy dtype."""

    dtype: str

    def arrays(self, shape: Shape) -> dict[str, Array]:
        return {MAIN: Array(np.dtype(self.dtype), shape)}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        import torch

        return {MAIN: values.to(getattr(torch, np.dtype(self.dtype).name))}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays[MAIN]


class BFloat16:
    """bfloat16, whose bit patterns are stored as uint16: numpy and zarr have no such type."""

    def arrays(self, shape: Shape) -> dict[str, Array]:
        return {MAIN: Array(np.dtype("<u2"), shape)}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        import torch

        return {MAIN: values.bfloat16().view(torch.uint16)}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        import torch

        return arrays[MAIN].view(torch.bfloat16).float()
