"""Fast path for uncompressed local files whose rows all have the same layout.

Each row is read with one system call, headers and gaps included, and checked with a few Python
calls, where the general path handles every array by itself. A row that fails a check is left to
the general path, which names the damaged array.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from pipeline.storage.local import GAP
from pipeline.store.arrays import (
    MAX_CLASS_DIGITS,
    TRIMMED_HEADER,
    ArrayReader,
    trimmed_header,
)
from pipeline.store.checksums import CHECKSUMS
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
    header_checksum: int
    nbytes: int
    """Payload bytes after the header (0 for class labels, which have no header either); of a
    trimmed array, those of the largest sample."""
    trimmed: bool = False


class FixedLayout(NamedTuple):
    """Layout shared by all rows of one file."""

    arrays: tuple[FixedArray, ...]
    row_bytes: int
    """Bytes to read for one row, without the payload of a trimmed array."""
    trimmed: bool
    """True if the last array is trimmed, so that its payload differs in length."""


_Target = tuple[FixedArray, bytearray, memoryview, np.ndarray]
"""An array, the buffer for its gap and header (reused for every row), the batch's bytes, and the
same as a read-only array for checksums."""


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
        targets, checksum = self._prepare(layout.arrays), CHECKSUMS[file.checksum]
        some_sizes = file.sizes[rows]
        sizes = some_sizes.tolist()
        begins = file.offsets[rows, 0].tolist()
        checked = check or [False] * len(rows)
        expected = file.crc32[rows].tolist() if any(checked) else []
        row_bytes = layout.row_bytes
        for number, place in enumerate(request.places.tolist()):
            buffers: list[bytearray | memoryview] = []
            for array, prefix, payload, _ in targets:
                buffers.append(prefix)
                if size := array.nbytes:
                    buffers.append(payload[place * size : (place + 1) * size])
            if layout.trimmed:
                stored = sizes[number][-1] - TRIMMED_HEADER
                row_bytes = layout.row_bytes + stored
                buffers[-1] = buffers[-1][:stored]
            if os.preadv(descriptor, buffers, begins[number]) != row_bytes:
                return False, 0
            checksums = expected[number] if checked[number] else None
            if not self._is_valid(targets, place, sizes[number], checksums, checksum):
                return False, 0
        return True, int(some_sizes.sum())

    def _is_valid(
        self,
        targets: list[_Target],
        place: int,
        sizes: list[int],
        expected: list[int] | None,
        checksum: Callable[[int, np.ndarray | bytes], int],
    ) -> bool:
        """Check headers, labels and checksums of the row just read; labels are parsed, and the rest
        of trimmed arrays is set to 0, here."""
        for number, (array, prefix, _, bytes_read) in enumerate(targets):
            if size := array.nbytes:
                header, start, stored = array.header, array.header_checksum, size
                if array.trimmed:
                    header = trimmed_header(array.nbytes, sizes[number])
                    stored = sizes[number] - TRIMMED_HEADER
                    start = checksum(0, header)
                    self._out[array.name][place, stored:] = 0
                if not prefix.endswith(header):
                    return False
                if expected is not None:
                    data = bytes_read[place * size : place * size + stored]
                    if checksum(start, data) != expected[number]:
                        return False
            else:
                text = bytes(prefix[array.gap : array.gap + sizes[number]])
                if not text.isdigit():
                    return False
                if expected is not None and checksum(0, text) != expected[number]:
                    return False
                self._out[array.name][place] = int(text)
        return True

    def _prepare(self, arrays: tuple[FixedArray, ...]) -> list[_Target]:
        """Buffers for these arrays; made once for consecutive files of the same layout."""
        if arrays != self._arrays:
            self._arrays, self._targets = arrays, []
            for array in arrays:
                flat = self._out[array.name].reshape(-1).view(np.uint8)
                to_check = flat.view()
                to_check.flags.writeable = False
                header = TRIMMED_HEADER if array.trimmed else len(array.header)
                prefix = bytearray(array.gap + (header if array.nbytes else TEXT_BYTES))
                self._targets.append((array, prefix, flat.data, to_check))
        return self._targets


def find_fixed_layout(file: FileTable, readers: Mapping[str, ArrayReader]) -> FixedLayout | None:
    """The layout of a file's rows; None where rows differ, an array is compressed or empty, another
    one than the last is trimmed, or the arrays of a row lie far apart."""
    if not len(file.offsets):
        return None
    checksum = CHECKSUMS[file.checksum]
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
            arrays.append(FixedArray(name, gap, reader.header, checksum(0, reader.header), nbytes))
            end = begin + reader.stored_size
        elif reader.is_text:
            if sizes.min() < 1 or sizes.max() > MAX_CLASS_DIGITS:
                return None
            arrays.append(FixedArray(name, gap, b"", 0, 0))
            end = begin + TEXT_BYTES
        elif reader.is_trimmed and column == len(file.names) - 1:
            largest = reader.part.nbytes
            if sizes.min() <= TRIMMED_HEADER or sizes.max() > TRIMMED_HEADER + largest:
                return None
            arrays.append(FixedArray(name, gap, b"", 0, largest, trimmed=True))
            end = begin + TRIMMED_HEADER
        else:
            return None
    return FixedLayout(tuple(arrays), end, arrays[-1].trimmed)
