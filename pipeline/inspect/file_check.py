"""What is wrong with one file of a store, found in a single pass over its bytes."""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pipeline.storage.files import file_size, read_ranges
from schemas.errors import plain_text
from schemas.store import StreamFile

PIECE = 8 << 20
"""Bytes that are read at once: what a thread holds in memory, whatever a record says."""
NAMED_SAMPLES = 16
"""So many of a file's damaged samples are named, the rest counted: a file may be another one."""


class Damage(NamedTuple):
    """One thing that is not as it was committed."""

    problem: str
    file: str
    """Path below the store's root."""
    stream: str | None = None
    shard: int | None = None
    sample: str | None = None
    """Key of the sample; None where it is not a matter of one."""

    def __str__(self) -> str:
        place = [f"stream '{self.stream}'"] if self.stream is not None else []
        place += [f"shard {self.shard}"] if self.shard is not None else []
        place += [f"sample '{self.sample}'"] if self.sample is not None else []
        return plain_text(f"{', '.join([*place, self.file])}: {self.problem}")


class _Range(NamedTuple):
    """Where one array of one sample lies."""

    begin: int
    end: int
    crc32: int
    row: int
    part: str


class _Checksums:
    """CRC-32 of every range of a file that comes piece after piece."""

    def __init__(self, ranges: Sequence[_Range]) -> None:
        """``ranges`` are sorted and do not overlap."""
        self.wrong: list[_Range] = []
        self._ranges = ranges
        self._finished = 0
        self._crc32 = 0

    def feed(self, begin: int, data: bytes) -> None:
        """The bytes of the file from ``begin`` on, where the last ones ended."""
        view, end = memoryview(data), begin + len(data)
        while self._finished < len(self._ranges):
            inside = self._ranges[self._finished]
            low, high = max(inside.begin, begin), min(inside.end, end)
            if low < high:
                self._crc32 = zlib.crc32(view[low - begin : high - begin], self._crc32)
            if inside.end > end:
                return
            if self._crc32 != inside.crc32:
                self.wrong.append(inside)
            self._finished, self._crc32 = self._finished + 1, 0

    @property
    def missing(self) -> list[_Range]:
        """Ranges beyond the bytes that came."""
        return list(self._ranges[self._finished :])


def check_file(
    filesystem: Any,
    root: str,
    about: StreamFile,
    keys: Sequence[str],
    on_bytes: Callable[[int], None],
) -> list[tuple[str | None, str]]:
    """(sample, problem) for everything that is wrong with a file, (None, problem) where no single
    sample is hurt. ``on_bytes`` hears how many bytes were read. Raises what the filesystem does."""
    path = f"{root}/{about.file}"
    try:
        size = file_size(filesystem, path)
    except FileNotFoundError:
        return [(None, "is missing")]
    found: list[tuple[str | None, str]] = []
    if size != about.bytes:
        found.append((None, f"has {size} bytes, not {about.bytes}"))
    ranges = sorted(_ranges(about))
    if any(a.end > b.begin for a, b in itertools.pairwise(ranges)):
        return [*found, (None, "its record gives two samples the same bytes")]
    digest, checksums = hashlib.sha256(), _Checksums(ranges)
    for begin, data in _pieces(filesystem, path, about.bytes):
        digest.update(data)
        checksums.feed(begin, data)
        on_bytes(len(data))
    whole = digest.hexdigest() == about.sha256
    cause = "has a wrong checksum" if not whole else "has another checksum in the record"
    hurt = [(r, "is cut off") for r in checksums.missing] + [(r, cause) for r in checksums.wrong]
    found += _by_sample(hurt, keys)
    if not found and not whole:
        where = "a header of the tar" if path.endswith(".tar") else "its index or padding"
        outside = (
            f"its bytes differ outside all samples ({where})" if ranges else "its bytes differ"
        )
        found.append((None, outside))
    return found


def _ranges(about: StreamFile) -> Iterator[_Range]:
    for part, offsets in about.offsets.items():
        places = zip(offsets, about.sizes[part], about.crc32[part], strict=True)
        for row, (begin, size, crc32) in enumerate(places):
            yield _Range(begin, begin + size, crc32, row, part)


def _pieces(filesystem: Any, path: str, size: int) -> Iterator[tuple[int, bytes]]:
    """The file's first ``size`` bytes, in order; fewer where it ends before."""
    for begin in range(0, size, PIECE):
        end = min(begin + PIECE, size)
        (data,) = read_ranges(filesystem, path, [(begin, end)])
        yield begin, data
        if len(data) < end - begin:
            return


def _by_sample(
    hurt: Sequence[tuple[_Range, str]], keys: Sequence[str]
) -> list[tuple[str | None, str]]:
    """One line for each sample, the first ones at least."""
    rows: dict[int, list[str]] = {}
    for damaged, cause in hurt:
        rows.setdefault(damaged.row, []).append(f"column '{damaged.part}' {cause}")
    found: list[tuple[str | None, str]] = [
        (keys[row], "; ".join(rows[row])) for row in sorted(rows)[:NAMED_SAMPLES]
    ]
    if len(rows) > NAMED_SAMPLES:
        found.append((None, f"{len(rows) - NAMED_SAMPLES} more of its samples are damaged"))
    return found
