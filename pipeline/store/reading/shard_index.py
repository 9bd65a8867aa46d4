"""The part of a commit record that a reader needs, as arrays: a tenth of the record's size."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from schemas.store import Checksum, CommitRecord, StreamFile


class FileTable(NamedTuple):
    """One file of a stream's shard (P stored arrays, n samples)."""

    file: str
    """Path below the store's root."""
    bytes: int
    sha256: str
    names: tuple[str, ...]
    """Names of the P arrays."""
    offsets: np.ndarray
    """int64 (n, P)"""
    sizes: np.ndarray
    """int64 (n, P)"""
    crc32: np.ndarray
    """uint32 (n, P)"""
    checksum: Checksum = "crc32"
    """Kind of these checksums."""
    alternatives: int = 1
    """Rows of one sample, of which a visit reads one."""

    @property
    def samples(self) -> int:
        return len(self.offsets) // self.alternatives


class ShardTable(NamedTuple):
    """One stream of one shard."""

    samples: int
    files: tuple[FileTable, ...]

    @property
    def names(self) -> set[str]:
        return {name for file in self.files for name in file.names}

    def only(self, names: Collection[str]) -> ShardTable:
        """The table without other arrays, and without files that hold no other."""
        files = (_only(file, names) for file in self.files)
        return ShardTable(self.samples, tuple(file for file in files if file.names))


def shard_table(record: CommitRecord, stream: str, checksum: Checksum = "crc32") -> ShardTable:
    """``checksum``: kind of the record's checksums."""
    files = (_file_table(file, checksum) for file in record.streams[stream])
    return ShardTable(record.samples, tuple(files))


def _only(file: FileTable, names: Collection[str]) -> FileTable:
    kept = [number for number, name in enumerate(file.names) if name in names]
    return file._replace(
        names=tuple(file.names[number] for number in kept),
        offsets=file.offsets[:, kept],
        sizes=file.sizes[:, kept],
        crc32=file.crc32[:, kept],
    )


def _file_table(file: StreamFile, checksum: Checksum) -> FileTable:
    def columns(values: dict[str, list[int]], dtype: type) -> np.ndarray:
        return np.array([values[name] for name in file.offsets], dtype).T

    return FileTable(
        file.file,
        file.bytes,
        file.sha256,
        tuple(file.offsets),
        columns(file.offsets, np.int64),
        columns(file.sizes, np.int64),
        columns(file.crc32, np.uint32),
        checksum,
    )
