"""From a position in the run to a rank's slice of the global batch, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.storage.retry import cancel_when
from pipeline.store.arrays import Allocate, allocate
from pipeline.store.errors import DamagedShardError
from pipeline.store.reading.disk_cache import DiskCache
from pipeline.store.reading.file_source import FileSource, for_share
from pipeline.store.reading.memory_cache import MemoryBudget
from pipeline.store.reading.quarantine import CHECK, Agree, Quarantine
from pipeline.store.reading.sample_order import SampleOrder
from pipeline.store.reading.stream_reader import Columns, Rows, StreamReader
from pipeline.store.store import Store
from schemas.errors import UserError
from schemas.run import DataConfig, OnBadShard

GIGA = 1_000_000_000


@dataclass(frozen=True)
class Batch:
    """One rank's slice of one global batch."""

    step: int
    positions: np.ndarray
    """int64 (B,): place of each sample in the run's endless order, which seeds its randomness."""
    columns: Mapping[str, Mapping[str, np.ndarray]]
    """stream -> column -> array (B, ...)."""


class _Task(NamedTuple):
    """Rows of one stream that a thread puts into a batch."""

    stream: str
    done: Future[list[Rows]]
    """What of it is damaged, where bad shards are left out."""


@dataclass
class _Pending:
    """A batch that is being read."""

    step: int
    positions: np.ndarray
    columns: dict[str, Columns]
    tasks: list[_Task]


def rank_slice(global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Begin and end of a rank's samples in a global batch; unequal where it does not divide."""
    return global_batch * rank // world_size, global_batch * (rank + 1) // world_size


def loader_options(config: DataConfig) -> dict[str, Any]:
    """Keywords of ``BatchLoader`` from a run's options. Raises ``UserError``."""
    disk = None
    if config.cache_dir is not None:
        disk = DiskCache(config.cache_dir, round(config.cache_gb * GIGA))
    return {
        "prefetch": config.prefetch,
        "verify": config.verify,
        "threads": config.threads,
        "memory": round(config.memory_gb * GIGA),
        "disk": disk,
        "on_bad_shard": config.on_bad_shard,
    }


class BatchLoader:
    """Iterates over the batches of steps ``start_step``, ``start_step + 1``, ... without end.

    ``prefetch`` batches are read ahead: ``threads`` threads fetch, verify and decompress the rows
    of each stream and shard straight into their places. Whole files are kept while their shuffle
    window lasts, up to ``memory`` bytes of all streams together; where there is no room, or where
    it costs less, only the wanted rows are read (``file_source.for_share``). None of this
    changes what a batch holds.

    Streams can be closed at any step; when ``close_streams`` returns, no byte of them is read any
    more; it waits for the reads under way, while storage is away for one attempt of each. Iterate,
    and close, from one thread.

    With ``on_bad_shard`` "quarantine" a sample that cannot be read in one of its streams is
    replaced, in all of them, by the next one of the epoch that can, and its shard is left out from
    the next epoch on. Which samples cannot be read is a property of the store, so that any number
    of ranks trains on the same ones; that all know of all such shards when an epoch ends is what
    ``agree`` is for. Where more shards are bad than quarantine is meant for, iteration, ``state``
    and the constructor raise ``UserError``, and so they do under either setting where a shard was
    never committed.
    """

    def __init__(
        self,
        store: Store,
        streams: Sequence[str],
        order: SampleOrder,
        *,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        needed_until: Mapping[str, int] | None = None,
        prefetch: int = 2,
        verify: bool = True,
        threads: int = 8,
        memory: int = 1 << 30,
        disk: DiskCache | None = None,
        on_bad_shard: OnBadShard = "stop",
        agree: Agree = set,
        allocate: Allocate = allocate,
    ) -> None:
        """``needed_until[stream]`` is a step, known beforehand, from which on it is not read.
        ``order`` must know of the shards that the run has quarantined so far. ``allocate`` gives
        the memory that batches are read into."""
        self._order = order
        self._global_batch = global_batch
        self._slice = rank_slice(global_batch, rank, world_size)
        self._next_step = start_step
        self._needed_until = dict(needed_until or {})
        self._prefetch = prefetch
        self.budget = MemoryBudget(memory)
        wants_whole = for_share(world_size)
        self._readers: dict[str, StreamReader] = {}
        for name in streams:
            source = FileSource(
                store.filesystem,
                store.root,
                wants_whole=wants_whole,
                budget=self.budget,
                disk=disk,
            )
            self._readers[name] = StreamReader(
                store, name, verify=verify, source=source, allocate=allocate
            )
        self._open = set(streams)
        self._pending: deque[_Pending] = deque()
        self._error: BaseException | None = None
        self._quarantine: Quarantine | None = None
        if on_bad_shard == "quarantine":
            self._quarantine = Quarantine(order, start_step * global_batch, agree)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="batch-loader")
        self._planner = IndexPrefetcher(order, self._pool)
        self._read_ahead()

    @property
    def bytes_read(self) -> dict[str, int]:
        """Bytes that storage sent so far, per stream, closed ones included."""
        return {name: reader.bytes_read for name, reader in self._readers.items()}

    @property
    def opens(self) -> dict[str, int]:
        """Requests to storage so far, per stream, closed ones included."""
        return {name: reader.opens for name, reader in self._readers.items()}

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._next()

    def state(self) -> dict[str, Any]:
        """What a resumed run must know beside its step; every rank calls it, between two steps.
        ``SampleOrder`` takes it up as ``damaged``."""
        damaged = self._order.damaged if self._quarantine is None else self._quarantine.damaged()
        return {"damaged": {str(shard): epoch for shard, epoch in sorted(damaged.items())}}

    def close_streams(self, names: Sequence[str]) -> None:
        """Stop reading these streams for good; batches that were read ahead lose them too."""
        self._open -= set(names)
        running = []
        for batch in self._pending:
            running += [task.done for task in batch.tasks if task.stream in names]
            batch.tasks = [task for task in batch.tasks if task.stream not in names]
            for name in names:
                batch.columns.pop(name, None)
        for name in names:  # what waits for storage to come back does not wait any longer
            self._readers[name].source.closed.set()
        self._cancel(running)
        for name in names:
            self._readers[name].close()

    def close(self) -> None:
        """End the threads and close every stream."""
        self.close_streams(list(self._readers))
        self._pool.shutdown()

    def _next(self) -> Batch:
        if self._error is not None:
            raise self._error
        try:
            if self._pending:
                batch = self._finish(self._pending.popleft())
            else:
                batch = self._across_epochs()
        except BaseException as error:
            self._error = error
            raise
        for reader in self._readers.values():
            reader.expire((batch.step + 1) * self._global_batch + self._slice[0])
        self._read_ahead()
        return batch

    def _read_ahead(self) -> None:
        """Begin to read batches until enough are under way. Where shards may be left out, an epoch
        is not begun before the last one has been read to its end."""
        while self._open and len(self._pending) < self._prefetch:
            step = self._next_step
            quarantine, behind = self._quarantine, (step + 1) * self._global_batch
            if quarantine is not None and behind > quarantine.epoch_end:
                return
            begin, end = (step * self._global_batch + place for place in self._slice)
            self._pending.append(self._begin(step, begin, end))
            self._next_step += 1
            if quarantine is None:  # else the order may change in between
                self._planner.expect(begin + self._global_batch, end + self._global_batch)

    def _begin(self, step: int, begin: int, end: int) -> _Pending:
        """Let the threads read the samples at positions ``begin`` to ``end``."""
        groups = self._planner(begin, end)
        batch = _Pending(step, np.arange(begin, end, dtype=np.int64), {}, [])
        for name in self._needed(step):
            batch.columns[name] = self._readers[name].empty(end - begin)
        for name, columns in batch.columns.items():
            for some in self._readers[name].together(groups):
                done = self._pool.submit(self._fill_or_report, name, columns, some)
                batch.tasks.append(_Task(name, done))
        return batch

    def _fill_or_report(self, name: str, columns: Columns, groups: Sequence[Rows]) -> list[Rows]:
        """Those that are damaged, where bad shards are to be left out."""
        if self._quarantine is None:
            self._fill(name, columns, groups)
            return []
        damaged = []
        for group in groups:
            try:
                self._fill(name, columns, [group])
            except DamagedShardError:
                damaged.append(group)
        return damaged

    def _fill(self, name: str, columns: Columns, groups: Sequence[Rows]) -> None:
        reader = self._readers[name]
        with cancel_when(reader.source.closed):
            reader.fill(columns, groups)

    def _needed(self, step: int) -> list[str]:
        return [
            name
            for name in self._readers
            if name in self._open and step < self._needed_until.get(name, step + 1)
        ]

    def _finish(self, batch: _Pending) -> Batch:
        """Wait for a batch. Raises the error of the first stream's first shard that has one,
        whoever was first in time."""
        bad: set[int] = set()
        # waiting for each by itself would wake this thread as often, beside those that read
        wait([task.done for task in batch.tasks], return_when=FIRST_EXCEPTION)
        try:
            for task in batch.tasks:
                for group in task.done.result():
                    bad |= set(group.places.tolist())
        except BaseException:
            self._cancel([task.done for task in batch.tasks])
            raise
        for place in sorted(bad):
            assert self._quarantine is not None
            self._substitute(self._quarantine, batch, place)
        return Batch(batch.step, batch.positions, batch.columns)

    def _substitute(self, quarantine: Quarantine, batch: _Pending, place: int) -> None:
        """Read the sample at ``place`` by itself or, if it cannot be, the next one of its epoch
        that can. Only what is read here counts as found: it is the same however far ahead the
        threads are."""
        for shard, row, until in quarantine.following(int(batch.positions[place]), batch.columns):
            alone = [Rows(shard, np.array([row]), np.array([place]), until)]
            for name, columns in batch.columns.items():
                try:
                    self._fill(name, columns, alone)
                except DamagedShardError as error:
                    quarantine.add(name, shard, row, error)
                    break
            else:
                return
        raise UserError(f"no sample of an epoch can be read: {CHECK}")

    def _across_epochs(self) -> Batch:
        """The batch of the next step, in which an epoch ends or before which one has ended, once
        its last part is read and all ranks know of all that is to be left out of the next."""
        quarantine = self._quarantine
        assert quarantine is not None  # without it nothing keeps from reading ahead
        step = self._next_step
        self._next_step += 1
        at, last = step * self._global_batch, (step + 1) * self._global_batch
        begin, end = at + self._slice[0], at + self._slice[1]
        parts = []
        while at < last:
            if at == quarantine.epoch_end:
                quarantine.turn_epoch()
                continue
            until = min(quarantine.epoch_end, last)
            first, behind = max(at, begin), min(until, end)
            parts.append(self._finish(self._begin(step, min(first, behind), behind)))
            at = until
        return _joined(parts)

    @staticmethod
    def _cancel(tasks: Sequence[Future[list[Rows]]]) -> None:
        """Those that have not begun never will; wait for the others."""
        wait([task for task in tasks if not task.cancel()])


def _joined(parts: Sequence[Batch]) -> Batch:
    columns = {
        stream: {
            name: np.concatenate([part.columns[stream][name] for part in parts])
            for name in parts[0].columns[stream]
        }
        for stream in parts[0].columns
    }
    positions = np.concatenate([part.positions for part in parts])
    return Batch(parts[0].step, positions, columns)


def shards_of(order: SampleOrder, begin: int, end: int) -> list[Rows]:
    """The samples at positions ``begin`` to ``end`` of the run, by shard, rows ascending. Their
    places count from ``begin``."""
    shards, rows, until = order.locate_windows(np.arange(begin, end, dtype=np.int64))
    places = np.lexsort((rows, shards))  # neighbours in a file become one request
    numbers, starts = np.unique(shards[places], return_index=True)
    return [
        Rows(shard, rows[some], some, int(until[some].max()))
        for shard, some in zip(numbers.tolist(), np.split(places, starts)[1:], strict=True)
    ]


class IndexPrefetcher:
    """``shards_of`` an order that stays as it is, by a thread where it is known what comes next.

    Little work, but of many small steps, which a training step should not wait for.
    """

    def __init__(self, order: SampleOrder, threads: Executor) -> None:
        self._order = order
        self._threads = threads
        self._expected: tuple[tuple[int, int], Future[list[Rows]]] | None = None

    def __call__(self, begin: int, end: int) -> list[Rows]:
        """Worked out now, unless it was expected and a thread has found the time to begin."""
        expected, self._expected = self._expected, None
        if expected is not None:
            span, rows = expected
            if not rows.cancel() and span == (begin, end):
                return rows.result()
        return shards_of(self._order, begin, end)

    def expect(self, begin: int, end: int) -> None:
        """Let a thread begin with what will be asked for next."""
        self._expected = (begin, end), self._threads.submit(shards_of, self._order, begin, end)
