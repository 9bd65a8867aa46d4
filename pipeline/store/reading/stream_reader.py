"""Random access to one stream of a store, with verified checksums."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.storage.files import StorageError
from pipeline.storage.local import scatter
from pipeline.store.arrays import (
    Allocate,
    ArrayReader,
    allocate,
    check_stored,
    empty_batch,
    max_stored_size,
    stream_parts,
)
from pipeline.store.codecs import find_codec
from pipeline.store.codecs.rice import RicePerToken, impossible_headers
from pipeline.store.errors import (
    DamagedArrayError,
    DamagedShardError,
    LostShardError,
    UncommittedShardError,
)
from pipeline.store.reading.file_source import FileSource, whole_up_to
from pipeline.store.reading.fixed_layout import FixedLayout, RowReader, find_fixed_layout
from pipeline.store.reading.memory_cache import SharedCache
from pipeline.store.reading.row_request import Columns, RowRequest, ShardRows
from pipeline.store.reading.shard_index import ShardTable, shard_table
from pipeline.store.store import Store
from schemas.errors import UserError
from schemas.store import CommitRecord
from schemas.streams import Column

__all__ = ["DamagedShardError", "StreamReader"]

SHARDS_PER_BLOCK = 256
MIN_TASK_SECONDS = 2e-3
"""Work given to a thread at once; waking a thread takes a fiftieth of it."""
MIN_CACHED_TABLES = 64


class _Shard(NamedTuple):
    """Index of one shard, and the fixed layout of each of its files (None without one)."""

    table: ShardTable
    layouts: list[FixedLayout | None]


class StreamReader:
    """Random access to one stream.

    Without a ``source`` it fetches files up to ``whole_file_limit`` bytes whole, caches those of
    the last ``cache_files`` shards, and reads only the requested rows of larger files. The loader
    passes a ``source`` with another policy. A row's checksum is verified the first time that this
    reader reads it, and every time that it comes from a local disk cache.

    ``fill`` is safe to call from several threads, ``read`` is not.
    """

    def __init__(
        self,
        store: Store,
        stream: str,
        *,
        columns: Collection[str] | None = None,
        verify: bool = True,
        whole_file_limit: int = 8 << 20,
        cache_files: int = 8,
        source: FileSource | None = None,
        allocate: Allocate = allocate,
    ) -> None:
        """``columns``: the only columns to read, by default all."""
        manifest = store.manifest
        if stream not in manifest.streams:
            raise UserError(
                f"store '{store.shown_url}' has no stream '{stream}'; it holds: "
                f"{', '.join(manifest.streams)}"
            )
        self.store = store
        self.stream = stream
        held = manifest.streams[stream].columns
        self._held = stream_parts(held)
        if columns is not None:
            held = {name: column for name, column in held.items() if name in columns}
        self._npy = manifest.format != "zarr"
        self._describe(held)
        self._rows_per_shard = manifest.shard_size
        self._names = frozenset(self.parts)
        """Arrays of the files that are read."""
        self._fixed = len(self._names) == len(self._held)
        """True to look for the fixed layout of rows, which parts of a row need not have."""
        self.verify = verify
        self.cache_files = cache_files
        self._allocate = allocate
        self.source = source or FileSource(
            store.filesystem, store.root, fetch_whole=whole_up_to(whole_file_limit)
        )
        self.seconds_per_sample = math.inf
        """Recent reading time of one sample: rises at once, falls slowly."""
        self._files_per_shard = len(self.parts) if manifest.format == "zarr" else 1
        self._shards: SharedCache[_Shard] = SharedCache()
        # One bit per row, in blocks of shards. Two threads in one shard may overwrite each other's
        # bits; the rows are then verified again.
        self._verified: dict[int, np.ndarray] = {}

    def _describe(self, columns: Mapping[str, Column]) -> None:
        """Read these columns."""
        self.parts = stream_parts(columns)
        self._packed = {
            name: column.shape
            for name, column in columns.items()
            if isinstance(find_codec(column.codec), RicePerToken)
        }
        self._arrays = {name: ArrayReader(part, npy=self._npy) for name, part in self.parts.items()}

    @property
    def opens(self) -> int:
        """Requests to storage so far."""
        return self.source.opens

    @property
    def bytes_read(self) -> int:
        """Bytes received from storage so far."""
        return self.source.bytes_read

    def empty(self, count: int) -> Columns:
        """Uninitialised arrays for ``count`` samples, for ``fill``. Raises ``UserError`` when
        memory cannot hold them."""
        try:
            return {
                name: empty_batch(part, count, self._allocate) for name, part in self.parts.items()
            }
        except MemoryError:
            raise UserError(
                f"{count} samples of stream '{self.stream}' of {self.store.shown_url} do not "
                "fit into memory: take a smaller batch"
            ) from None

    def read(self, shards: np.ndarray, rows: np.ndarray) -> Columns:
        """The samples at ``(shards[i], rows[i])``: per stored array (len(rows), *shape),
        contiguous, decompressed but not decoded (see ``pipeline.store.codecs``)."""
        out = self.empty(len(rows))
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            places = places[np.argsort(rows[places])]  # neighbours become one request
            self.fill(out, [ShardRows(shard, rows[places], places)])
            self.source.cache.shrink(self.cache_files * self._files_per_shard)
            self._shards.shrink(max(self.cache_files, MIN_CACHED_TABLES))
        return out

    def split_into_tasks(self, groups: Sequence[ShardRows]) -> Iterator[Sequence[ShardRows]]:
        """Groups for one thread each: for local files ``MIN_TASK_SECONDS`` of work or more, by the
        recent reading time; for other storage one shard, because its latency dominates."""
        seconds = self.seconds_per_sample if self.source.is_direct else math.inf
        begin = count = 0
        for number, group in enumerate(groups, start=1):
            count += len(group.rows)
            if count * seconds >= MIN_TASK_SECONDS or number == len(groups):
                yield groups[begin:number]
                begin, count = number, 0

    def fill(self, out: Columns, groups: Sequence[ShardRows]) -> None:
        """Read rows of shards into their places of ``out``. Raises ``DamagedShardError``,
        ``UncommittedShardError`` and ``StorageError``."""
        row_reader = RowReader(out)
        loaded = [self._load_shard(group.shard, group.expires_at) for group in groups]
        start = time.perf_counter()  # records are read once per window
        for shard, group in zip(loaded, groups, strict=True):
            self._fill_shard(out, row_reader, shard, group)
        seconds = (time.perf_counter() - start) / max(1, sum(len(group.rows) for group in groups))
        before = seconds if math.isinf(self.seconds_per_sample) else self.seconds_per_sample
        # The average falls slowly because a slow read may be followed by another one.
        self.seconds_per_sample = max(seconds, 0.9 * before + 0.1 * seconds)

    def _fill_shard(
        self, out: Columns, row_reader: RowReader, loaded: _Shard, group: ShardRows
    ) -> None:
        shard, rows, places, expires_at, _ = group
        table, layouts = loaded
        numbers = rows.tolist()
        if max(numbers) >= table.samples:
            raise DamagedShardError(
                f"{self._where(shard)} has {table.samples} samples, not {max(numbers) + 1}: the "
                "store's index is stale; delete it and run the extraction again"
            )
        check = None
        if self.verify:
            bits = self._verified_bits(shard).data  # in Python, because a group has few rows
            check = [not bits[row >> 3] >> (row & 7) & 1 for row in numbers]
        for file, layout in zip(table.files, layouts, strict=True):
            request = RowRequest(file, out, shard, rows, places, check, expires_at)
            try:
                self._read_rows(request, layout, row_reader)
            except FileNotFoundError:
                raise LostShardError(f"{self._where(shard)} is missing") from None
        if check is not None and any(check):
            self._check_packed(out, group)
            for row in numbers:
                bits[row >> 3] |= 1 << (row & 7)

    def _check_packed(self, out: Columns, group: ShardRows) -> None:
        for name, (tokens, width) in self._packed.items():
            wrong = impossible_headers(out[name], group.places, tokens, width)
            if wrong.any():
                row = int(group.rows[wrong.argmax()])
                raise self._damaged(group.shard, row, name, "its tokens have impossible lengths")

    def expire(self, position: int) -> None:
        """Free cached bytes that are needed only before ``position`` of the run."""
        self.source.expire(position)
        self._shards.expire(position)

    def close(self) -> None:
        """Free cached bytes. The reader must not be used afterwards."""
        self.source.close()
        self._shards.clear()

    def _read_rows(
        self, request: RowRequest, layout: FixedLayout | None, row_reader: RowReader
    ) -> None:
        """Fill the request's places by the fastest path that its file allows. A fixed layout whose
        rows are not as expected is read again array by array, which names the damaged one."""
        if not self.source.is_direct:
            self._read_from_source(request)
        elif layout is None or not self._read_fixed(request, layout, row_reader):
            self._read_arrays(request)

    def _read_fixed(self, request: RowRequest, layout: FixedLayout, row_reader: RowReader) -> bool:
        """One system call per row of a local file; False where a row is not as expected."""

        def read(descriptor: int) -> tuple[bool, int]:
            return row_reader.read(descriptor, layout, request)

        return bool(self.source.read_directly(request.file, read, request.expires_at))

    def _read_arrays(self, request: RowRequest) -> None:
        """Each array of a local file: uncompressed ones are read straight into the batch."""
        file, rows, out = request.file, request.rows, request.out
        offsets, sizes = file.offsets[rows].tolist(), file.sizes[rows].tolist()
        crc32 = file.crc32[rows].tolist()
        arrays = [self._arrays[name] for name in file.names]
        targets = [array.targets(out[n]) for array, n in zip(arrays, file.names, strict=True)]
        places = request.places.tolist()
        pieces = [
            (offsets[number][column], target(place, sizes[number][column]))
            for number, place in enumerate(places)
            for column, target in enumerate(targets)
        ]

        def read(descriptor: int) -> tuple[list[int], int]:
            counts = scatter(descriptor, pieces)
            return counts, sum(counts)

        counts = self.source.read_directly(file, read, request.expires_at)
        check = request.check or [False] * len(rows)
        for piece, count in enumerate(counts or [0] * len(pieces)):
            number, column = divmod(piece, len(arrays))
            buffers, name = pieces[piece][1], file.names[column]
            try:
                crc = crc32[number][column] if check[number] else None
                check_stored(buffers, count, sizes[number][column], crc, file.checksum)
                arrays[column].finish(buffers, out[name], places[number])
            except ValueError as error:
                raise self._damaged(request.shard, int(rows[number]), name, str(error)) from None

    def _read_from_source(self, request: RowRequest) -> None:
        """Byte ranges from memory, the disk cache or storage. Damage in the disk cache is not
        reported before storage has sent the same bytes."""
        file, rows = request.file, request.rows
        offsets, sizes = file.offsets[rows], file.sizes[rows]
        ranges = list(zip(offsets.ravel().tolist(), sizes.ravel().tolist(), strict=True))
        refetch = False
        while True:
            data, from_disk = self.source.read(file, ranges, request.expires_at, refetch=refetch)
            check = [True] * len(rows) if from_disk else request.check or [False] * len(rows)
            try:
                self._decode(request, data, check)
                return
            except DamagedArrayError as error:
                if from_disk and not refetch:
                    refetch = True
                    continue
                row = int(rows[error.number])
                raise self._damaged(request.shard, row, error.name, error.reason) from None

    def _decode(self, request: RowRequest, pieces: list[memoryview], check: list[bool]) -> None:
        """Decompress pieces, row by row and array by array, into the batch. Raises
        ``DamagedArrayError``."""
        file, rows = request.file, request.rows
        sizes, crc32 = file.sizes[rows], file.crc32[rows]
        remaining = iter(pieces)
        for number, place in enumerate(request.places.tolist()):
            for column, name in enumerate(file.names):
                data = next(remaining)
                try:
                    crc = int(crc32[number, column]) if check[number] else None
                    check_stored([data], len(data), int(sizes[number, column]), crc, file.checksum)
                    self._arrays[name].fill(data, request.out[name][place : place + 1])
                except ValueError as error:
                    raise DamagedArrayError(number, name, str(error)) from None

    def _damaged(self, shard: int, row: int, name: str, reason: str) -> DamagedShardError:
        key = self.store.record(shard, self.stream).keys[row]
        return DamagedShardError(
            f"{self._where(shard)} is damaged: sample '{key}', column '{name}': {reason}; delete "
            "its commit record and run the extraction again"
        )

    def record(self, shard: int) -> CommitRecord:
        """The commit record of a shard. Raises ``LostShardError`` where it does not belong to the
        store, ``UncommittedShardError`` and ``StorageError``."""
        try:
            return self.store.record(shard, self.stream)
        except (StorageError, UncommittedShardError):
            raise
        except UserError as error:
            raise LostShardError(f"{self._where(shard)}: {error}") from None

    def _load_shard(self, shard: int, expires_at: int) -> _Shard:
        def load() -> _Shard:
            table = self._read_table(shard)
            if not self._fixed or not self.source.is_direct:
                return _Shard(table, [None] * len(table.files))
            return _Shard(table, [find_fixed_layout(file, self._arrays) for file in table.files])

        loaded = self._shards.get(shard, load, expires_at=expires_at)
        assert loaded is not None  # this cache has no byte limit
        return loaded

    def _read_table(self, shard: int) -> ShardTable:
        """The index of a shard, of the arrays that are read."""
        table = self._checked(
            shard, shard_table(self.record(shard), self.stream, self.store.manifest.checksum)
        )
        return table.only(self._names) if len(self._names) < len(self._held) else table

    def _checked(self, shard: int, table: ShardTable) -> ShardTable:
        """The table. Raises ``DamagedShardError`` when the record lists other arrays, more samples
        or larger ones than the manifest allows, before anything of the shard is read."""
        where = f"{self._where(shard)}: its record"
        if table.samples > self.store.manifest.shard_size:
            raise DamagedShardError(f"{where} lists {table.samples} samples")
        if table.samples and table.names != self._held.keys():
            raise DamagedShardError(f"{where} lists other columns")
        for file in table.files:
            for name, size in zip(file.names, file.sizes.max(0, initial=0), strict=True):
                limit = max_stored_size(self._held[name])
                if size > limit:
                    raise DamagedShardError(
                        f"{where} gives a sample of column '{name}' {size} bytes, more than the "
                        f"{limit} that it can take"
                    )
        return table

    def _verified_bits(self, shard: int) -> np.ndarray:
        """uint8, one bit per row of the shard: set once the row is verified. Changed in place."""
        size = -(-self._rows_per_shard // 8)
        block = self._verified.get(shard // SHARDS_PER_BLOCK)
        if block is None:
            block = np.zeros((SHARDS_PER_BLOCK, size), np.uint8)
            block = self._verified.setdefault(shard // SHARDS_PER_BLOCK, block)
        return block[shard % SHARDS_PER_BLOCK]

    def _where(self, shard: int) -> str:
        return f"stream '{self.stream}', shard {shard} of {self.store.shown_url}"
