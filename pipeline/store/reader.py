"""Reading one stream of a store by shard and row, verified."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from pipeline.store.columns import decode, empty_batch
from pipeline.store.store import Store
from schemas.errors import UserError
from schemas.store import StreamFile


class DamagedShardError(UserError):
    """Bytes of a shard are not those that were committed."""


class StreamReader:
    """Random access to one stream. Not thread-safe; open it in the thread or process that reads.

    Files up to ``whole_file_limit`` bytes are fetched whole and the last ``cache_files`` of them
    kept, as many as a shuffle window needs; of larger ones only the wanted rows are read. Each
    row's checksum is verified the first time that this reader meets it. ``opens`` and
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
        self.columns = store.manifest.streams[stream].columns
        self.verify = verify
        self.whole_file_limit = whole_file_limit
        self.cache_files = cache_files
        self.opens = 0
        self.bytes_read = 0
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._verified: dict[int, np.ndarray] = {}

    def read(self, shards: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The samples at ``(shards[i], rows[i])``: per column an array (len(rows), *shape)."""
        out = {name: empty_batch(spec, len(rows)) for name, spec in self.columns.items()}
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
        record = self.store.record(shard)
        file = record.streams[self.stream]
        verified = self._verified.setdefault(shard, np.zeros(record.samples, dtype=bool))
        names = list(self.columns)
        if file.offsets.keys() != self.columns.keys():
            raise DamagedShardError(f"{self._where(shard)}: its record lists other columns")
        if rows[-1] >= record.samples:  # rows come sorted
            raise DamagedShardError(
                f"{self._where(shard)} has {record.samples} samples, not {rows[-1] + 1}: the "
                "store's index is stale; delete it and run the extraction again"
            )
        ranges = [
            (file.offsets[name][row], file.sizes[name][row]) for row in rows for name in names
        ]
        parts = iter(self._fetch(shard, file, ranges))
        for row, place in zip(rows, places, strict=True):
            for name in names:
                data = next(parts)
                try:
                    if len(data) != file.sizes[name][row]:
                        raise ValueError("the file is too short")
                    unverified = self.verify and not verified[row]
                    if unverified and zlib.crc32(data) != file.crc32[name][row]:
                        raise ValueError("its checksum is wrong")
                    out[name][place] = decode(self.columns[name], data)
                except ValueError as error:
                    raise DamagedShardError(
                        f"{self._where(shard)} is damaged: sample '{record.keys[row]}', column "
                        f"'{name}': {error}; delete its commit record and run the extraction again"
                    ) from None
            verified[row] = True

    def _fetch(
        self, shard: int, file: StreamFile, ranges: Sequence[tuple[int, int]]
    ) -> list[memoryview]:
        if file.bytes <= self.whole_file_limit:
            whole = memoryview(self._whole(shard, file))
            return [whole[start : start + size] for start, size in ranges]
        # Members of one sample lie side by side: reading across the headers between them is one
        # request instead of several.
        spans: list[list[int]] = []
        homes = []
        for start, size in ranges:
            if spans and 0 <= start - spans[-1][1] <= 4096:
                spans[-1][1] = start + size
            else:
                spans.append([start, start + size])
            homes.append(len(spans) - 1)
        blocks = [memoryview(block) for block in self._read_spans(shard, file, spans)]
        return [
            blocks[home][start - spans[home][0] :][:size]
            for home, (start, size) in zip(homes, ranges, strict=True)
        ]

    def _read_spans(self, shard: int, file: StreamFile, spans: list[list[int]]) -> list[bytes]:
        path = f"{self.store.root}/{file.file}"
        self.opens += 1
        try:
            blocks: list[bytes] = self.store.filesystem.cat_ranges(
                [path] * len(spans), [s for s, _ in spans], [e for _, e in spans], on_error="raise"
            )
        except FileNotFoundError:
            raise DamagedShardError(f"{self._where(shard)} is missing") from None
        self.bytes_read += sum(len(block) for block in blocks)
        return blocks

    def _whole(self, shard: int, file: StreamFile) -> bytes:
        if shard in self._cache:
            self._cache.move_to_end(shard)
            return self._cache[shard]
        self.opens += 1
        try:
            data: bytes = self.store.filesystem.cat_file(f"{self.store.root}/{file.file}")
        except FileNotFoundError:
            raise DamagedShardError(f"{self._where(shard)} is missing") from None
        self.bytes_read += len(data)
        self._cache[shard] = data
        if len(self._cache) > self.cache_files:
            self._cache.popitem(last=False)
        return data

    def _where(self, shard: int) -> str:
        return f"stream '{self.stream}', shard {shard} of {self.store.shown_url}"
