"""Writes zarr v3 arrays: one for each stored array; a store's shard is one shard of each array.

zarr itself encodes each shard as a whole, in memory; shards are published as tars are. The reader
reads samples by the byte ranges of the commit record, as from tars; stock zarr opens the arrays.

Row ``shard * shard_size + n`` is sample n of a shard. Arrays of a complete store end with its last
sample. Skipped images leave rows without a sample before that, because shards are written without
knowledge of each other: such rows have the class -1, and the attribute ``samples`` is the true
number.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.store.arrays import SHUFFLED, ZSTD_LEVEL, StoredArray, use_one_blosc_thread
from pipeline.store.checksums import extend
from pipeline.store.layout import array_rows, chunk_path
from schemas.store import Checksum, StreamFile

if TYPE_CHECKING:
    from zarr.storage import MemoryStore

ABSENT = (1 << 64) - 1  # offset, in a shard's index, of a chunk that was never written


def metadata_files(
    streams: Mapping[str, Mapping[str, StoredArray]],
    *,
    shard_size: int,
    num_shards: int,
    samples_per_shard: Sequence[int] | None = None,
) -> dict[str, bytes]:
    """Every ``zarr.json`` of a store, by path below its root. Without ``samples_per_shard``, which
    only a complete store has, arrays have rows for full shards."""
    import zarr  # here and below, because stores of tars need none
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    memory = MemoryStore(files)
    rows = num_shards * shard_size
    attributes: dict[str, int] = {}
    if samples_per_shard is not None:
        rows = array_rows(samples_per_shard, shard_size)
        samples = sum(samples_per_shard)
        attributes = {} if samples == rows else {"samples": samples}
    zarr.create_group(memory, zarr_format=3, attributes=attributes)
    for stream, parts in streams.items():
        zarr.create_group(memory, path=stream, zarr_format=3)
        for name, part in parts.items():
            _create(memory, f"{stream}/{name}", part, shard_size, rows, attributes)
    return {path: buffer.to_bytes() for path, buffer in files.items()}


class ZarrWriter:
    """Writes one stream of one shard as local files, one for each array."""

    def __init__(
        self,
        folder: Path,
        prefix: str,
        stream: str,
        shard: int,
        parts: Mapping[str, StoredArray],
        shard_size: int,
        checksum: Checksum,
    ) -> None:
        """Files are written to ``folder`` under names that begin with ``prefix``."""
        self.parts = parts
        self._folder = folder
        self._prefix = prefix
        self._stream = stream
        self._shard = shard
        self._shard_size = shard_size
        self._checksum = checksum
        self._values: dict[str, list[np.ndarray]] = {name: [] for name in parts}
        self._written: list[Path] = []

    def add(self, key: str, values: Mapping[str, np.ndarray]) -> None:
        """Append the next sample: an array for each part."""
        for name, samples in self._values.items():
            samples.append(values[name])

    def finish(self) -> list[tuple[Path, StreamFile]]:
        """Write the shard of every array. Returns the local files and their entries in the commit
        record; none for a shard without samples, because zarr has no empty shards."""
        return [
            self._write(number, name, part)
            for number, (name, part) in enumerate(self.parts.items())
            if self._values[name]
        ]

    def abandon(self) -> None:
        """Remove the local files."""
        for path in self._written:
            path.unlink(missing_ok=True)
        self._values.clear()

    def _write(self, number: int, name: str, part: StoredArray) -> tuple[Path, StreamFile]:
        values = self._values.pop(name)
        samples = len(values)
        data = _shard_bytes(part, np.stack(values), self._shard_size)
        path = self._folder / f"{self._prefix}{number}"
        self._written.append(path)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        ranges = _chunk_ranges(data, samples, self._shard_size)
        info = StreamFile(
            file=chunk_path(self._stream, name, self._shard, len(part.shape)),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            offsets={name: [start for start, _ in ranges]},
            sizes={name: [size for _, size in ranges]},
            crc32={
                name: [
                    extend(self._checksum, 0, data[start : start + size]) for start, size in ranges
                ]
            },
        )
        return path, info


def _create(
    memory: MemoryStore,
    path: str,
    part: StoredArray,
    shard_size: int,
    rows: int,
    attributes: Mapping[str, int] | None = None,
) -> Any:
    import zarr
    from zarr.codecs import BloscCodec, ZstdCodec

    compressors: list[Any] = []
    if part.lossless == "zstd" or part.trimmed:
        compressors = [ZstdCodec(level=ZSTD_LEVEL)]
    elif part.lossless == "blosc":
        compressors = [
            BloscCodec(
                typesize=part.dtype.itemsize,
                cname=SHUFFLED["cname"],
                clevel=SHUFFLED["clevel"],
                shuffle="bitshuffle",
            )
        ]
    return zarr.create_array(
        memory,
        name=path,
        shape=(rows, *part.shape),
        dtype=part.dtype,
        chunks=(1, *part.shape),
        shards=(shard_size, *part.shape),
        compressors=compressors,
        filters=[],
        fill_value=_fill_value(part),
        attributes=dict(attributes or {}),
        zarr_format=3,
        config={"write_empty_chunks": True},  # samples of zeros too
    )


def _fill_value(part: StoredArray) -> float:
    """Value of rows without a sample: no class, not a number, or 0 for integers of codecs, which
    use all their values."""
    if part.dtype == np.int64:
        return -1
    return np.nan if part.dtype.kind == "f" else 0


def _shard_bytes(part: StoredArray, values: np.ndarray, shard_size: int) -> bytes:
    """One zarr shard with the rows ``values``, followed by rows that were never written."""
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    array = _create(MemoryStore(files), "x", part, shard_size, shard_size)
    use_one_blosc_thread()
    array[: len(values)] = values
    data: bytes = files["x/c/0" + "/0" * len(part.shape)].to_bytes()
    return data


def _chunk_ranges(data: bytes, samples: int, shard_size: int) -> list[tuple[int, int]]:
    """Offset and size of each sample's chunk, from the index at the end of a shard: pairs of
    uint64 and a CRC-32C (zarr v3's sharding codec)."""
    index = np.frombuffer(data, "<u8", 2 * shard_size, len(data) - 16 * shard_size - 4)
    pairs = index.reshape(shard_size, 2)[:samples].tolist()
    if any(start == ABSENT for start, _ in pairs):
        raise RuntimeError("zarr left out a sample of a shard")
    return [(start, size) for start, size in pairs]
