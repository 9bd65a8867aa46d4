"""Features on disk while they are many, so that memory does not grow with them."""

from __future__ import annotations

import tempfile

import numpy as np
from torch import Tensor

from schemas.errors import UserError


class Spool:
    """Float32 rows in a temporary file, which is gone with the object."""

    def __init__(self, count: int, limit: int) -> None:
        """``count`` rows will be offered; at most ``limit``, evenly spread, are kept."""
        self._count, self._limit = count, limit
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._seen = self._kept = self._width = 0

    def add(self, features_BD: Tensor) -> None:
        """The next rows. Raises ``UserError`` where the disk is full."""
        numbers = np.arange(self._seen, self._seen + len(features_BD))
        self._seen += len(numbers)
        rows = features_BD.float().cpu().numpy()
        if self._limit < self._count:
            limit, count = self._limit, self._count
            rows = rows[numbers * limit // count != (numbers + 1) * limit // count]
        self._width = rows.shape[1]
        self._kept += len(rows)
        try:
            self._file.write(np.ascontiguousarray(rows).data)
        except OSError as error:
            raise UserError(
                f"features cannot be kept in '{tempfile.gettempdir()}': {error.strerror}; set "
                "TMPDIR to a disk with room, or lower --manifold-images"
            ) from None

    def rows(self) -> np.ndarray:
        """(N, D) float32, a read-only memory map."""
        self._file.flush()
        shape = (self._kept, self._width)
        if not self._kept:
            return np.empty(shape, np.float32)
        return np.memmap(self._file, np.float32, "r", shape=shape)

    def close(self) -> None:
        """Rows taken before stay readable as long as they are held."""
        self._file.close()
