"""What a codec is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # a page about a store needs shapes only: torch takes seconds to import
    from torch import Tensor

Shape = tuple[int, ...]


class Array(NamedTuple):
    """One stored array of one sample."""

    dtype: np.dtype[Any]
    shape: Shape


MAIN = ""
"""Name of a codec's largest array, the one that is worth compressing. It is stored under the
column's own name, the others as ``column.name``."""


class Codec(Protocol):
    """A tensor of samples (B, *shape) to stored arrays (B, ...), and back on any device.

    Tensors of tokens are (B, ..., T, D): T vectors of D numbers.
    """

    def arrays(self, shape: Shape) -> dict[str, Array]:
        """What is stored for a sample of ``shape``: ``MAIN`` and others. Raises ``ValueError``
        where the codec is not for such a shape."""

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """Finite numbers (B, *shape) to the stored arrays."""

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The stored arrays to numbers (B, *shape); float32 where they were not stored exactly."""
