"""The interface of codecs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from schemas.codecs import Lossless

if TYPE_CHECKING:  # importing torch takes seconds, and inspecting a store needs only shapes
    from torch import Tensor

Shape = tuple[int, ...]


class Array(NamedTuple):
    """One stored array of one sample."""

    dtype: np.dtype[Any]
    shape: Shape
    trimmed: bool = False
    """True if only the bytes up to the last one that is not 0 are stored, because samples differ in
    length: an array of bytes, of one dimension and the largest length."""


MAIN = ""
"""Name of a codec's largest array, the only one worth compressing. It is stored under the column's
own name, the others as ``column.name``."""

STORED_AS_IS = "as is"
"""Family of the codecs that store each number in a numpy dtype or in bfloat16."""


class Codec(Protocol):
    """Encodes tensors of samples (B, *shape) to stored arrays (B, ...), and back on any device.

    Tensors of tokens are (B, ..., T, D): T vectors of D numbers.
    """

    @property
    def family(self) -> str:
        """Codecs of one family are ordered by ``levels``: see ``ordering.coarser_than``."""

    @property
    def levels(self) -> int:
        """Resolution within the family; 0 where its codecs are not ordered."""

    @property
    def bits_per_value(self) -> float | None:
        """Estimated bits of one number after lossless compression; None where it is not estimated
        or the bytes are stored unchanged.

        Measured on photographs with random weights of trained models' statistics. Stored streams
        are within 10% of it, in bfloat16 within 15%, because attention varies more in its
        exponents than tokens do.
        """

    @property
    def lossless(self) -> Lossless:
        """The lossless compression that pays for ``MAIN``: entropy coding, because codes are not
        uniform, without bit shuffling, which makes quantised codes a quarter larger."""

    def arrays(self, shape: Shape) -> dict[str, Array]:
        """The arrays stored for a sample of ``shape``: ``MAIN`` and others. Raises ``ValueError``
        for a shape that the codec does not support."""

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """The stored arrays of finite numbers (B, *shape)."""

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The numbers (B, *shape) of stored arrays; float32 where they were not stored exactly."""
