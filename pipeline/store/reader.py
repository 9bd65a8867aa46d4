"""Reading one stream of a store by shard and row, verified."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from pipeline.files import read_at_most, read_ranges
from pipeline.store.parts import (
    empty_batch,
    largest_stored,
    read_chunk,
    read_npy_member,
    stream_parts,
)
from pipeline.store.store import Store
from schemas.errors import UserError
from schemas.store import CommitRecord, StreamFile


class DamagedShardError(UserError):
    """Bytes of a shard are not those that were committed."""


class StreamReader:
    """Random access to one stream. Not thread-safe; open it in the thread or process that reads.

    Files up to ``whole_file_limit`` bytes are fetched whole, and those of the last ``cache_files``
    shards kept, as many as a shuffle window needs; of larger ones only the wanted rows are read.
    Each row's checksum is verified the first time that this reader meets it. ``opens`` and
    ``bytes_read`` count what storage was asked for.
    """

    def __init__(
        self,
        store: Store,
        stream: str,
        *,
        verify: bool = True,
        whole_file_limit: int = 8 << 20,
        cache_files: int = 8,
    ) -> None:
        if stream not in store.manifest.streams:
            raise UserError(
                f"store '{store.shown_url}' has no stream '{stream}'; it holds: "
                f"{', '.join(store.manifest.streams)}"
            )
        self.store = store
        self.stream = stream
        self.parts = stream_parts(store.manifest.streams[stream].columns)
        self._decode = read_chunk if store.manifest.format == "zarr" else read_npy_member
        self.verify = verify
        self.whole_file_limit = whole_file_limit
        self.cache_files = cache_files
        self.opens = 0
        self.bytes_read = 0
        self._cache: OrderedDict[str, bytes] = OrderedDict()  # by path
        self._verified: dict[int, np.ndarray] = {}

    def read(self, shards: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The samples at ``(shards[i], rows[i])``: per stored array (len(rows), *shape),
        contiguous, decompressed but not decoded (see ``pipeline.store.codecs``)."""
        try:
            out = {name: empty_batch(part, len(rows)) for name, part in self.parts.items()}
        except MemoryError:
            raise UserError(
                f"{len(rows)} samples of stream '{self.stream}' of {self.store.shown_url} do not "
                "fit into memory: take a smaller batch"
            ) from None
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            places = places[np.argsort(rows[places])]  # neighbours in the file become one request
            self._read_shard(int(shard), rows[places], places, out)
        return out

    def close(self) -> None:
        """Let go of cached bytes. The reader must not be used afterwards."""
        self._cache.clear()

    def _read_shard(
        self, shard: int, rows: np.ndarray, places: np.ndarray, out: dict[str, np.ndarray]
    ) -> None:
        record = self.store.record(shard, self.stream)
        if shard not in self._verified:
            self._check_record(shard, record)
            self._verified[shard] = np.zeros(record.samples, dtype=bool)
        if rows[-1] >= record.samples:  # rows come sorted
            raise DamagedShardError(
                f"{self._where(shard)} has {record.samples} samples, not {rows[-1] + 1}: the "
                "store's index is stale; delete it and run the extraction again"
            )
        for file in record.streams[self.stream]:
            self._read_file(shard, record, file, rows, places, out)
        self._verified[shard][rows] = True

    def _check_record(self, shard: int, record: CommitRecord) -> None:
        """Raises ``DamagedShardError`` where it promises other arrays, or larger ones, than the
        manifest does; nothing of the shard has been read by then."""
        sizes = {
            name: of for file in record.streams[self.stream] for name, of in file.sizes.items()
        }
        if record.samples and sizes.keys() != self.parts.keys():
            raise DamagedShardError(f"{self._where(shard)}: its record lists other columns")
        for name, found in sizes.items():
            if max(found, default=0) > largest_stored(self.parts[name]):
                raise DamagedShardError(
                    f"{self._where(shard)}: its record gives a sample of column '{name}' "
                    f"{max(found)} bytes, more than it can take up"
                )

    def _read_file(
        self,
        shard: int,
        record: CommitRecord,
        file: StreamFile,
        rows: np.ndarray,
        places: np.ndarray,
        out: dict[str, np.ndarray],
    ) -> None:
        verified = self._verified[shard]
        names = list(file.offsets)
        ranges = [
            (file.offsets[name][row], file.sizes[name][row]) for row in rows for name in names
        ]
        pieces = iter(self._fetch(shard, file, ranges))
        for row, place in zip(rows, places, strict=True):
            for name in names:
                data = next(pieces)
                try:
                    if len(data) != file.sizes[name][row]:
                        raise ValueError("the file is too short")
                    unverified = self.verify and not verified[row]
                    if unverified and zlib.crc32(data) != file.crc32[name][row]:
                        raise ValueError("its checksum is wrong")
                    out[name][place] = self._decode(self.parts[name], data)
                except ValueError as error:
                    raise DamagedShardError(
                        f"{self._where(shard)} is damaged: sample '{record.keys[row]}', column "
                        f"'{name}': {error}; delete its commit record and run the extraction again"
                    ) from None

    def _fetch(
        self, shard: int, file: StreamFile, ranges: Sequence[tuple[int, int]]
    ) -> list[memoryview]:
        if file.bytes <= self.whole_file_limit:
            whole = memoryview(self._whole(shard, file))
            return [whole[start : start + size] for start, size in ranges]
        # Neighbours are one request: reading across a tar's headers is cheaper than asking twice.
        # (zarr orders the chunks of a shard as it likes: a file's order is not that of its rows.)
        spans: list[list[int]] = []
        homes = [0] * len(ranges)
        for number in sorted(range(len(ranges)), key=ranges.__getitem__):
            start, size = ranges[number]
            if spans and 0 <= start - spans[-1][1] <= 4096:
                spans[-1][1] = start + size
            else:
                spans.append([start, start + size])
            homes[number] = len(spans) - 1
        blocks = [memoryview(block) for block in self._read_spans(shard, file, spans)]
        return [
            blocks[home][start - spans[home][0] :][:size]
            for home, (start, size) in zip(homes, ranges, strict=True)
        ]

    def _read_spans(self, shard: int, file: StreamFile, spans: list[list[int]]) -> list[bytes]:
        path = f"{self.store.root}/{file.file}"
        self.opens += 1
        try:
            blocks = read_ranges(self.store.filesystem, path, [(s, e) for s, e in spans])
        except FileNotFoundError:
            raise DamagedShardError(f"{self._where(shard)} is missing") from None
        self.bytes_read += sum(len(block) for block in blocks)
        return blocks

    def _whole(self, shard: int, file: StreamFile) -> bytes:
        if file.file in self._cache:
            self._cache.move_to_end(file.file)
            return self._cache[file.file]
        self.opens += 1
        try:
            path = f"{self.store.root}/{file.file}"
            data = read_at_most(self.store.filesystem, path, file.bytes)  # it may have grown
        except FileNotFoundError:
            raise DamagedShardError(f"{self._where(shard)} is missing") from None
        self.bytes_read += len(data)
        self._cache[file.file] = data
        files_of_a_shard = len(self.parts) if self.store.manifest.format == "zarr" else 1
        if len(self._cache) > self.cache_files * files_of_a_shard:
            self._cache.popitem(last=False)
        return data

    def _where(self, shard: int) -> str:
        return f"stream '{self.stream}', shard {shard} of {self.store.shown_url}"
