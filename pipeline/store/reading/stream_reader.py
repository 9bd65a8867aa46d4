"""Reading one stream of a store by shard and row, verified."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
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
    largest_stored,
    stream_parts,
)
from pipeline.store.errors import (
    DamagedArrayError,
    DamagedShardError,
    LostShardError,
    UncommittedShardError,
)
from pipeline.store.reading.file_source import FileSource, up_to
from pipeline.store.reading.fixed_layout import FixedLayout, RowReader, fixed_rows
from pipeline.store.reading.memory_cache import SharedCache
from pipeline.store.reading.shard_index import FileTable, ShardTable, shard_table
from pipeline.store.store import Store
from schemas.errors import UserError

__all__ = ["DamagedShardError", "StreamReader"]

SHARDS_OF_A_BLOCK = 256
TASK_SECONDS = 2e-3
"""Of one thread's work; waking it takes a fiftieth of that."""

Columns = dict[str, np.ndarray]
"""Per stored array (B, *shape), contiguous."""


class Rows(NamedTuple):
    """Rows of one shard, and where in a batch they go."""

    shard: int
    rows: np.ndarray
    """Best ascending, as neighbours are one request then."""
    places: np.ndarray
    until: int = 0
    """Position of the run up to which more of the shard will be wanted; see ``expire``."""


class _Shard(NamedTuple):
    """What is known of a shard beforehand."""

    table: ShardTable
    fixed: list[FixedLayout | None]
    """Of each file, where it can be read in the quick way."""


class StreamReader:
    """Random access to one stream.

    By itself it fetches files up to ``whole_file_limit`` bytes whole, and keeps those of the last
    ``cache_files`` shards; of larger ones it reads the wanted rows. A loader gives it a ``source``
    that decides otherwise. Each row's checksum is verified the first time that this reader meets
    it, and whenever it comes from a local disk cache.

    ``fill`` is safe to call from several threads, ``read`` is not.
    """

    def __init__(
        self,
        store: Store,
        stream: str,
        *,
        verify: bool = True,
        whole_file_limit: int = 8 << 20,
        cache_files: int = 8,
        source: FileSource | None = None,
        allocate: Allocate = allocate,
    ) -> None:
        manifest = store.manifest
        if stream not in manifest.streams:
            raise UserError(
                f"store '{store.shown_url}' has no stream '{stream}'; it holds: "
                f"{', '.join(manifest.streams)}"
            )
        self.store = store
        self.stream = stream
        self.parts = stream_parts(manifest.streams[stream].columns)
        self.verify = verify
        self.cache_files = cache_files
        self._allocate = allocate
        self.source = source or FileSource(
            store.filesystem, store.root, wants_whole=up_to(whole_file_limit)
        )
        npy = manifest.format != "zarr"
        self._layouts = {name: ArrayReader(part, npy=npy) for name, part in self.parts.items()}
        self.pace = math.inf
        """Seconds that a sample took lately; more than that rather than less."""
        self._files_per_shard = len(self.parts) if manifest.format == "zarr" else 1
        self._tables: SharedCache[_Shard] = SharedCache()
        # A bit for each row, in blocks of shards; two threads in one shard may lose each other's,
        # which verifies anew.
        self._verified: dict[int, np.ndarray] = {}

    @property
    def opens(self) -> int:
        """Requests to storage so far."""
        return self.source.opens

    @property
    def bytes_read(self) -> int:
        """Bytes that storage sent so far."""
        return self.source.bytes_read

    def empty(self, count: int) -> Columns:
        """Arrays for ``count`` samples, for ``fill``."""
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
            self.fill(out, [Rows(shard, rows[places], places)])
            self.source.kept.shrink(self.cache_files * self._files_per_shard)
            self._tables.shrink(max(self.cache_files, 64))
        return out

    def together(self, wanted: Sequence[Rows]) -> Iterator[Sequence[Rows]]:
        """What one thread had better read in one go: of local files enough to be worth its waking,
        going by how long samples took lately; a shard each where they are waited for."""
        pace = self.pace if self.source.is_direct else math.inf
        begin = count = 0
        for number, (_, rows, _, _) in enumerate(wanted, start=1):
            count += len(rows)
            if count * pace >= TASK_SECONDS or number == len(wanted):
                yield wanted[begin:number]
                begin, count = number, 0

    def fill(self, out: Columns, wanted: Sequence[Rows]) -> None:
        """Put rows of shards at their places of ``out``."""
        landing, start = RowReader(out), time.perf_counter()
        for some in wanted:
            self._fill_shard(out, landing, some)
        seconds = (time.perf_counter() - start) / max(1, sum(len(some.rows) for some in wanted))
        before = seconds if math.isinf(self.pace) else self.pace
        self.pace = max(seconds, 0.9 * before + 0.1 * seconds)  # what is slow once may be so again

    def _fill_shard(self, out: Columns, landing: RowReader, wanted: Rows) -> None:
        shard, rows, places, until = wanted
        table, fixed = self._table(shard, until)
        if rows.max() >= table.samples:
            raise DamagedShardError(
                f"{self._where(shard)} has {table.samples} samples, not {rows.max() + 1}: the "
                "store's index is stale; delete it and run the extraction again"
            )
        check = None
        if self.verify:
            bits = self._bits(shard)
            check = np.unpackbits(bits, bitorder="little")[rows] == 0
        for file, same in zip(table.files, fixed, strict=True):
            try:
                if not self.source.is_direct:
                    self._fill_from(file, out, shard, rows, places, check, until)
                elif same is None or not self._fill_fixed(
                    file, same, landing, rows, places, check, until
                ):
                    self._fill_directly(file, out, shard, rows, places, check, until)
            except FileNotFoundError:
                raise LostShardError(f"{self._where(shard)} is missing") from None
        if check is not None and check.any():
            np.bitwise_or.at(bits, rows // 8, (1 << rows % 8).astype(np.uint8))

    def expire(self, position: int) -> None:
        """Let go of what is needed only before ``position``."""
        self.source.kept.expire(position)
        self._tables.expire(position)

    def close(self) -> None:
        """Let go of cached bytes. The reader must not be used afterwards."""
        self.source.close()
        self._tables.clear()

    def _fill_fixed(
        self,
        file: FileTable,
        fixed: FixedLayout,
        landing: RowReader,
        rows: np.ndarray,
        places: np.ndarray,
        check: np.ndarray | None,
        until: int,
    ) -> bool:
        """Whether all is as it should be."""

        def read(descriptor: int) -> tuple[bool, int]:
            return landing.read(descriptor, fixed, rows, places, check)

        return bool(self.source.read_directly(file, read, until))

    def _fill_directly(
        self,
        file: FileTable,
        out: Columns,
        shard: int,
        rows: np.ndarray,
        places: np.ndarray,
        check: np.ndarray | None,
        until: int,
    ) -> None:
        """As ``_fill_from``, from a local file: what is stored as it is goes where it belongs."""
        offsets, sizes = file.offsets[rows].tolist(), file.sizes[rows].tolist()
        crc32 = file.crc32[rows].tolist()
        layouts = [self._layouts[name] for name in file.names]
        landings = [layout.places(out[n]) for layout, n in zip(layouts, file.names, strict=True)]
        targets = places.tolist()
        pieces = [
            (offsets[number][column], landing(place, sizes[number][column]))
            for number, place in enumerate(targets)
            for column, landing in enumerate(landings)
        ]

        def read(descriptor: int) -> tuple[list[int], int]:
            counts = scatter(descriptor, pieces)
            return counts, sum(counts)

        counts = self.source.read_directly(file, read, until)
        checked = np.zeros(len(rows), bool) if check is None else check
        for piece, count in enumerate(counts or [0] * len(pieces)):
            number, column = divmod(piece, len(layouts))
            buffers, name = pieces[piece][1], file.names[column]
            try:
                crc = crc32[number][column] if checked[number] else None
                check_stored(buffers, count, sizes[number][column], crc)
                layouts[column].finish(buffers, out[name], targets[number])
            except ValueError as error:
                raise self._damaged(shard, int(rows[number]), name, str(error)) from None

    def _fill_from(
        self,
        file: FileTable,
        out: Columns,
        shard: int,
        rows: np.ndarray,
        places: np.ndarray,
        check: np.ndarray | None,
        until: int,
    ) -> None:
        offsets, sizes, crc32 = file.offsets[rows], file.sizes[rows], file.crc32[rows]
        ranges = list(zip(offsets.ravel().tolist(), sizes.ravel().tolist(), strict=True))
        anew = False
        while True:
            pieces, cached = self.source.read(file, ranges, until, anew=anew)
            if cached:
                checked = np.ones(len(rows), bool)
            else:
                checked = np.zeros(len(rows), bool) if check is None else check
            try:
                self._decode(file, out, places, pieces, sizes, crc32, checked)
                return
            except DamagedArrayError as error:
                if cached and not anew:
                    anew = True  # the disk cache is to blame until storage says the same
                    continue
                row = int(rows[error.number])
                raise self._damaged(shard, row, error.name, error.reason) from None

    def _decode(
        self,
        file: FileTable,
        out: Columns,
        places: np.ndarray,
        pieces: list[memoryview],
        sizes: np.ndarray,
        crc32: np.ndarray,
        check: np.ndarray,
    ) -> None:
        remaining = iter(pieces)
        for number, place in enumerate(places.tolist()):
            for column, name in enumerate(file.names):
                data = next(remaining)
                try:
                    crc = int(crc32[number, column]) if check[number] else None
                    check_stored([data], len(data), int(sizes[number, column]), crc)
                    self._layouts[name].fill(data, out[name][place : place + 1])
                except ValueError as error:
                    raise DamagedArrayError(number, name, str(error)) from None

    def _damaged(self, shard: int, row: int, name: str, reason: str) -> DamagedShardError:
        key = self.store.record(shard, self.stream).keys[row]
        return DamagedShardError(
            f"{self._where(shard)} is damaged: sample '{key}', column '{name}': {reason}; delete "
            "its commit record and run the extraction again"
        )

    def _table(self, shard: int, until: int) -> _Shard:
        def load() -> _Shard:
            try:
                record = self.store.record(shard, self.stream)
            except (StorageError, UncommittedShardError):
                raise
            except UserError as error:
                raise LostShardError(f"{self._where(shard)}: {error}") from None
            table = self._checked(shard, shard_table(record, self.stream))
            direct = self.source.is_direct
            fixed = [fixed_rows(file, self._layouts) if direct else None for file in table.files]
            return _Shard(table, fixed)

        table = self._tables.get(shard, load, until=until)
        assert table is not None  # it counts no bytes
        return table

    def _checked(self, shard: int, table: ShardTable) -> ShardTable:
        """Raises ``DamagedShardError`` where a record promises other arrays, more samples or larger
        ones than the manifest does; nothing of the shard has been read by then."""
        where = f"{self._where(shard)}: its record"
        if table.samples > self.store.manifest.shard_size:
            raise DamagedShardError(f"{where} lists {table.samples} samples")
        if table.samples and table.names != self.parts.keys():
            raise DamagedShardError(f"{where} lists other columns")
        for file in table.files:
            for name, largest in zip(file.names, file.sizes.max(0, initial=0), strict=True):
                if largest > largest_stored(self.parts[name]):
                    raise DamagedShardError(
                        f"{where} gives a sample of column '{name}' {largest} bytes, more than it "
                        "can take up"
                    )
        return table

    def _bits(self, shard: int) -> np.ndarray:
        """uint8: a bit for each row of a shard that has been verified, to be changed in place."""
        size = -(-self.store.manifest.shard_size // 8)
        block = self._verified.get(shard // SHARDS_OF_A_BLOCK)
        if block is None:
            block = np.zeros((SHARDS_OF_A_BLOCK, size), np.uint8)
            block = self._verified.setdefault(shard // SHARDS_OF_A_BLOCK, block)
        return block[shard % SHARDS_OF_A_BLOCK]

    def _where(self, shard: int) -> str:
        return f"stream '{self.stream}', shard {shard} of {self.store.shown_url}"
