"""Uncompressed samples, whose arrays lie at the same distances in every row of a file.

Such a row is read with one call of the system, header bytes and gaps included, and looked at with
a few more of Python's, where the general way treats each array by itself. Whatever is not as it
should be is left to that, which names it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pipeline.storage.local import GAP
from pipeline.store.arrays import CLASS_DIGITS, ArrayReader
from pipeline.store.reading.shard_index import FileTable

TEXT = 32
"""Bytes taken of a class number: tars pad their members to more, whatever its digits are."""


class FixedArray(NamedTuple):
    """One array of every row."""

    name: str
    gap: int
    """Bytes between the end of the one before it and its own: its header's, or its text's."""
    header: bytes
    header_crc32: int
    nbytes: int
    """Behind the header. A class number has neither."""


class FixedLayout(NamedTuple):
    """The rows of one file."""

    arrays: tuple[FixedArray, ...]
    span: int
    """Bytes to be read for a row."""
    file: FileTable


class RowReader:
    """Where one thread's rows go in the arrays (B, *shape), contiguous, of a batch."""

    def __init__(self, out: Mapping[str, np.ndarray]) -> None:
        self._out = out
        self._arrays: tuple[FixedArray, ...] = ()
        self._columns: list[tuple[FixedArray, bytearray, memoryview]] = []

    def read(
        self,
        descriptor: int,
        file: FixedLayout,
        rows: np.ndarray,
        places: np.ndarray,
        check: np.ndarray | None,
    ) -> tuple[bool, int]:
        """Rows of a file into their places: whether all are what the manifest and, where ``check``
        (bool, by row) says so, their checksums promise, and the bytes of their arrays. What is in
        the places of the others is worthless."""
        columns = self._prepared(file.arrays)
        sizes = file.file.sizes[rows].tolist()
        begins = file.file.offsets[rows, 0].tolist()
        checked = [False] * len(rows) if check is None else check.tolist()
        crc32 = file.file.crc32[rows].tolist() if any(checked) else []
        total = 0
        for number, place in enumerate(places.tolist()):
            buffers: list[bytearray | memoryview] = []
            for array, before, numbers in columns:
                buffers.append(before)
                if size := array.nbytes:
                    buffers.append(numbers[place * size : (place + 1) * size])
            if os.preadv(descriptor, buffers, begins[number]) != file.span:
                return False, total
            total += sum(sizes[number])
            sums = crc32[number] if checked[number] else None
            if not self._is_right(columns, place, sizes[number], sums):
                return False, total
        return True, total

    def _is_right(
        self,
        columns: list[tuple[FixedArray, bytearray, memoryview]],
        place: int,
        sizes: list[int],
        crc32: list[int] | None,
    ) -> bool:
        for number, (array, before, numbers) in enumerate(columns):
            if size := array.nbytes:
                if not before.endswith(array.header):
                    return False
                if crc32 is not None:
                    data = numbers[place * size : (place + 1) * size]
                    if zlib.crc32(data, array.header_crc32) != crc32[number]:
                        return False
            else:
                text = before[array.gap : array.gap + sizes[number]]
                if not text.isdigit():
                    return False
                if crc32 is not None and zlib.crc32(text) != crc32[number]:
                    return False
                self._out[array.name][place] = int(text)
        return True

    def _prepared(
        self, arrays: tuple[FixedArray, ...]
    ) -> list[tuple[FixedArray, bytearray, memoryview]]:
        """Each array, what is before its numbers (read into the same bytes for every row), and the
        batch's bytes; once for all files that are alike."""
        if arrays != self._arrays:
            self._arrays = arrays
            self._columns = [
                (
                    array,
                    bytearray(array.gap + (len(array.header) if array.nbytes else TEXT)),
                    self._out[array.name].reshape(-1).view(np.uint8).data,
                )
                for array in arrays
            ]
        return self._columns


def fixed_rows(file: FileTable, layouts: Mapping[str, ArrayReader]) -> FixedLayout | None:
    """None where rows differ or something is compressed, and where they are far apart."""
    if not len(file.offsets):
        return None
    distances = file.offsets - file.offsets[:, :1]
    if (distances != distances[0]).any():
        return None
    arrays = []
    end = 0
    for column, (name, begin) in enumerate(zip(file.names, distances[0].tolist(), strict=True)):
        layout, sizes = layouts[name], file.sizes[:, column]
        gap = begin - end
        if not 0 <= gap <= GAP:
            return None
        if layout.stored_size is not None:
            nbytes = layout.part.nbytes
            if not nbytes or (sizes != layout.stored_size).any():
                return None
            arrays.append(FixedArray(name, gap, layout.header, zlib.crc32(layout.header), nbytes))
            end = begin + layout.stored_size
        elif layout.is_text:
            if sizes.min() < 1 or sizes.max() > CLASS_DIGITS:
                return None
            arrays.append(FixedArray(name, gap, b"", 0, 0))
            end = begin + TEXT
        else:
            return None
    return FixedLayout(tuple(arrays), end, file)
