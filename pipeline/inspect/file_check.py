"""Check of one file of a store in a single pass over its bytes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pipeline.storage.files import file_size, read_ranges
from pipeline.store.checksums import extend
from schemas.errors import plain_text
from schemas.store import Checksum, StreamFile

CHUNK_BYTES = 8 << 20
"""Bytes per read; bounds a thread's memory independently of the record."""
MAX_NAMED_SAMPLES = 16
"""Damaged samples of a file that are named; the others are counted."""


class Damage(NamedTuple):
    """One difference between a file and its commit record."""

    problem: str
    file: str
    """Path relative to the store's root."""
    stream: str | None = None
    shard: int | None = None
    sample: str | None = None
    """Key of the damaged sample; None if the damage is outside all samples."""

    def __str__(self) -> str:
        place = [f"stream '{self.stream}'"] if self.stream is not None else []
        place += [f"shard {self.shard}"] if self.shard is not None else []
        place += [f"sample '{self.sample}'"] if self.sample is not None else []
        return plain_text(f"{', '.join([*place, self.file])}: {self.problem}")


class _Range(NamedTuple):
    """Byte range of one array of one sample, and its checksum."""

    begin: int
    end: int
    checksum: int
    row: int
    part: str


class _Checksums:
    """Checksum of every range of a file that is read in chunks."""

    def __init__(self, ranges: Sequence[_Range], kind: Checksum) -> None:
        """``ranges`` are sorted and do not overlap."""
        self._kind = kind
        self.wrong: list[_Range] = []
        self._ranges = ranges
        self._finished = 0
        self._found = 0

    def feed(self, begin: int, data: bytes) -> None:
        """The next bytes of the file; ``begin`` is where the previous ones ended."""
        view, end = memoryview(data), begin + len(data)
        while self._finished < len(self._ranges):
            current = self._ranges[self._finished]
            low, high = max(current.begin, begin), min(current.end, end)
            if low < high:
                piece = view[low - begin : high - begin]
                self._found = extend(self._kind, self._found, piece)
            if current.end > end:
                return
            if self._found != current.checksum:
                self.wrong.append(current)
            self._finished, self._found = self._finished + 1, 0

    @property
    def missing(self) -> list[_Range]:
        """Ranges that were not read completely."""
        return list(self._ranges[self._finished :])


def check_file(
    filesystem: Any,
    root: str,
    file: StreamFile,
    keys: Sequence[str],
    on_bytes: Callable[[int], None],
    checksum: Checksum,
) -> list[tuple[str | None, str]]:
    """(sample, problem) for each damaged sample, (None, problem) for damage outside all samples.
    ``on_bytes`` is called with the bytes of each read. Raises the filesystem's own errors."""
    path = f"{root}/{file.file}"
    try:
        size = file_size(filesystem, path)
    except FileNotFoundError:
        return [(None, "is missing")]
    found: list[tuple[str | None, str]] = []
    if size != file.bytes:
        found.append((None, f"has {size} bytes, not {file.bytes}"))
    ranges = sorted(_ranges(file))
    if any(a.end > b.begin for a, b in itertools.pairwise(ranges)):
        return [*found, (None, "its record assigns the same bytes to two samples")]
    digest, checksums = hashlib.sha256(), _Checksums(ranges, checksum)
    for begin, data in _read_chunks(filesystem, path, file.bytes):
        digest.update(data)
        checksums.feed(begin, data)
        on_bytes(len(data))
    intact = digest.hexdigest() == file.sha256
    cause = "has a wrong checksum" if not intact else "differs from the checksum in its record"
    damaged = [(r, "is truncated") for r in checksums.missing] + [
        (r, cause) for r in checksums.wrong
    ]
    found += _by_sample(damaged, keys)
    if not found and not intact:
        where = "a header of the tar" if path.endswith(".tar") else "its index or padding"
        outside = (
            f"its bytes differ outside all samples ({where})" if ranges else "its bytes differ"
        )
        found.append((None, outside))
    return found


def _ranges(file: StreamFile) -> Iterator[_Range]:
    for part, offsets in file.offsets.items():
        places = zip(offsets, file.sizes[part], file.crc32[part], strict=True)
        for row, (begin, size, checksum) in enumerate(places):
            yield _Range(begin, begin + size, checksum, row, part)


def _read_chunks(filesystem: Any, path: str, size: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the file's first ``size`` bytes, in order; less if the file is shorter."""
    for begin in range(0, size, CHUNK_BYTES):
        end = min(begin + CHUNK_BYTES, size)
        (data,) = read_ranges(filesystem, path, [(begin, end)])
        yield begin, data
        if len(data) < end - begin:
            return


def _by_sample(
    damaged: Sequence[tuple[_Range, str]], keys: Sequence[str]
) -> list[tuple[str | None, str]]:
    """(sample, problem) for the first damaged samples, and the number of the others."""
    rows: dict[int, list[str]] = {}
    for place, cause in damaged:
        rows.setdefault(place.row, []).append(f"column '{place.part}' {cause}")
    found: list[tuple[str | None, str]] = [
        (keys[row], "; ".join(rows[row])) for row in sorted(rows)[:MAX_NAMED_SAMPLES]
    ]
    if len(rows) > MAX_NAMED_SAMPLES:
        found.append((None, f"{len(rows) - MAX_NAMED_SAMPLES} more of its samples are damaged"))
    return found
