"""Fast path for uncompressed local files whose rows all have the same layout.

Each row is read with one system call, headers and gaps included, and checked with a few Python
calls, where the general path handles every array by itself. A row that fails a check is left to
the general path, which names the damaged array.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pipeline.storage.local import GAP
from pipeline.store.arrays import MAX_CLASS_DIGITS, ArrayReader
from pipeline.store.reading.row_request import Columns, RowRequest
from pipeline.store.reading.shard_index import FileTable

TEXT_BYTES = 32
"""Bytes read for a class number: tars pad members to more, whatever the number of digits."""


class FixedArray(NamedTuple):
    """One array of every row."""

    name: str
    gap: int
    """Bytes between the end of the previous array and the header (or text) of this one."""
    header: bytes
    header_crc32: int
    nbytes: int
    """Payload bytes after the header (0 for class labels, which have no header either)."""


class FixedLayout(NamedTuple):
    """Layout shared by all rows of one file."""

    arrays: tuple[FixedArray, ...]
    row_bytes: int
    """Bytes to read for one row."""


_Target = tuple[FixedArray, bytearray, memoryview]
"""An array, the buffer for its gap and header (reused for every row), the batch's bytes."""


class RowReader:
    """Reads rows into the arrays (B, *shape), contiguous, of a batch; for one thread."""

    def __init__(self, out: Columns) -> None:
        self._out = out
        self._arrays: tuple[FixedArray, ...] = ()
        self._targets: list[_Target] = []

    def read(self, descriptor: int, layout: FixedLayout, request: RowRequest) -> tuple[bool, int]:
        """Read the request's rows from an open file. Returns True if all rows match the
        manifest and the checksums to verify, and the payload bytes read. On failure the contents of
        ``out`` at the request's places are undefined."""
        file, rows, check = request.file, request.rows, request.check
        targets = self._prepare(layout.arrays)
        sizes = file.sizes[rows].tolist()
        begins = file.offsets[rows, 0].tolist()
        checked = [False] * len(rows) if check is None else check.tolist()
        crc32 = file.crc32[rows].tolist() if any(checked) else []
        total = 0
        for number, place in enumerate(request.places.tolist()):
            buffers: list[bytearray | memoryview] = []
            for array, prefix, payload in targets:
                buffers.append(prefix)
                if size := array.nbytes:
                    buffers.append(payload[place * size : (place + 1) * size])
            if os.preadv(descriptor, buffers, begins[number]) != layout.row_bytes:
                return False, total
            total += sum(sizes[number])
            expected_crc32 = crc32[number] if checked[number] else None
            if not self._is_valid(targets, place, sizes[number], expected_crc32):
                return False, total
        return True, total

    def _is_valid(
        self, targets: list[_Target], place: int, sizes: list[int], crc32: list[int] | None
    ) -> bool:
        """Check headers, labels and checksums of the row just read; labels are parsed here."""
        for number, (array, prefix, payload) in enumerate(targets):
            if size := array.nbytes:
                if not prefix.endswith(array.header):
                    return False
                if crc32 is not None:
                    data = payload[place * size : (place + 1) * size]
                    if zlib.crc32(data, array.header_crc32) != crc32[number]:
                        return False
            else:
                text = prefix[array.gap : array.gap + sizes[number]]
                if not text.isdigit():
                    return False
                if crc32 is not None and zlib.crc32(text) != crc32[number]:
                    return False
                self._out[array.name][place] = int(text)
        return True

    def _prepare(self, arrays: tuple[FixedArray, ...]) -> list[_Target]:
        """Buffers for these arrays; made once for consecutive files of the same layout."""
        if arrays != self._arrays:
            self._arrays = arrays
            self._targets = [
                (
                    array,
                    bytearray(array.gap + (len(array.header) if array.nbytes else TEXT_BYTES)),
                    self._out[array.name].reshape(-1).view(np.uint8).data,
                )
                for array in arrays
            ]
        return self._targets


def find_fixed_layout(file: FileTable, readers: Mapping[str, ArrayReader]) -> FixedLayout | None:
    """The layout of a file's rows; None where rows differ, an array is compressed or empty, or the
    arrays of a row lie far apart."""
    if not len(file.offsets):
        return None
    distances = file.offsets - file.offsets[:, :1]
    if (distances != distances[0]).any():
        return None
    arrays = []
    end = 0
    for column, (name, begin) in enumerate(zip(file.names, distances[0].tolist(), strict=True)):
        reader, sizes = readers[name], file.sizes[:, column]
        gap = begin - end
        if not 0 <= gap <= GAP:
            return None
        if reader.stored_size is not None:
            nbytes = reader.part.nbytes
            if not nbytes or (sizes != reader.stored_size).any():
                return None
            arrays.append(FixedArray(name, gap, reader.header, zlib.crc32(reader.header), nbytes))
            end = begin + reader.stored_size
        elif reader.is_text:
            if sizes.min() < 1 or sizes.max() > MAX_CLASS_DIGITS:
                return None
            arrays.append(FixedArray(name, gap, b"", 0, 0))
            end = begin + TEXT_BYTES
        else:
            return None
    return FixedLayout(tuple(arrays), end)
