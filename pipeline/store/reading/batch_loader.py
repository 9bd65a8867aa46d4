"""Batches of a run: each rank's slice of the global batch, read ahead by threads."""

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
from pipeline.store.reading.caption_reader import DROP, CaptionReader
from pipeline.store.reading.disk_cache import DiskCache
from pipeline.store.reading.file_source import FileSource, whole_if_cheaper
from pipeline.store.reading.memory_cache import MemoryBudget
from pipeline.store.reading.quarantine import VERIFY_HINT, Agree, Quarantine
from pipeline.store.reading.row_request import Columns, ShardRows
from pipeline.store.reading.sample_order import SampleOrder
from pipeline.store.reading.stream_reader import StreamReader
from pipeline.store.store import Store
from schemas.errors import UserError
from schemas.run import DataConfig, OnBadShard

GIGA = 1_000_000_000


@dataclass(frozen=True)
class Batch:
    """One rank's slice of one global batch."""

    step: int
    positions: np.ndarray
    """int64 (B,): each sample's position in the endless order of the run, which seeds its noise."""
    columns: Mapping[str, Mapping[str, np.ndarray]]
    """stream -> stored array -> (B, ...)."""


class _Task(NamedTuple):
    """Rows of one stream that a thread reads into a batch."""

    stream: str
    damaged: Future[list[ShardRows]]
    """Groups that could not be read; always empty without quarantine, where the error is raised."""


@dataclass
class _Pending:
    """A batch that is being read."""

    step: int
    positions: np.ndarray
    columns: dict[str, Columns]
    tasks: list[_Task]


def rank_slice(global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Begin and end of a rank's samples in a global batch; slices differ by at most one sample."""
    return global_batch * rank // world_size, global_batch * (rank + 1) // world_size


def loader_options(config: DataConfig) -> dict[str, Any]:
    """Keyword arguments of ``BatchLoader`` from a run's options. Raises ``UserError``."""
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
    of each stream and shard straight into their places. Whole files are cached until their shuffle
    window ends, up to ``memory`` bytes of all streams together; when there is no room, or when it
    costs less, only the requested rows are read (``file_source.whole_if_cheaper``). None of this
    changes the contents of a batch.

    Streams can be closed at any step. ``close_streams`` waits for running reads (at most one
    attempt each when storage does not answer); after it returns no byte of them is read. Iterate
    and close from one thread.

    With ``on_bad_shard`` "quarantine", a sample that cannot be read in one of its streams is
    replaced, in all streams, by the next readable sample of the epoch, and its shard is left out
    from the next epoch on. Whether a sample can be read is a property of the store, so that any
    number of ranks trains on the same samples; ``agree`` makes all ranks know all such shards at
    the end of an epoch. With too many bad shards, iteration, ``state`` and the constructor raise
    ``UserError``. A shard that was never committed raises ``UserError`` under either setting.
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
        caption_drop: float = DROP,
    ) -> None:
        """``needed_until[stream]`` is the step, known in advance, from which on it is not read.
        ``order`` must already leave out the shards that the run has quarantined. ``allocate``
        provides the memory of batches. Of a stream of captions one caption a visit is read, none
        with probability ``caption_drop``: see ``CaptionReader``."""
        self._order = order
        self._global_batch = global_batch
        self._slice = rank_slice(global_batch, rank, world_size)
        self._next_step = start_step
        self._needed_until = dict(needed_until or {})
        self._prefetch = prefetch
        self.budget = MemoryBudget(memory)
        fetch_whole = whole_if_cheaper(world_size)
        self._readers: dict[str, StreamReader | CaptionReader] = {}
        for name in streams:
            source = FileSource(
                store.filesystem,
                store.root,
                fetch_whole=fetch_whole,
                budget=self.budget,
                disk=disk,
            )
            if name in store.manifest.text_streams:
                self._readers[name] = CaptionReader(
                    store,
                    name,
                    seed=order.seed,
                    drop=caption_drop,
                    epochs_of=order.epochs_of,
                    verify=verify,
                    source=source,
                    allocate=allocate,
                )
            else:
                self._readers[name] = StreamReader(
                    store, name, verify=verify, source=source, allocate=allocate
                )
        self._open = set(streams)
        self._pending: deque[_Pending] = deque()
        self._error: BaseException | None = None
        self._quarantine: Quarantine | None = None
        if on_bad_shard == "quarantine":
            self._quarantine = Quarantine(order, start_step * global_batch, agree)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="batch-loader")
        self._index = IndexPrefetcher(order, self._pool)
        self._read_ahead()

    @property
    def bytes_read(self) -> dict[str, int]:
        """Bytes received from storage so far, per stream, closed ones included."""
        return {name: reader.bytes_read for name, reader in self._readers.items()}

    @property
    def opens(self) -> dict[str, int]:
        """Requests to storage so far, per stream, closed ones included."""
        return {name: reader.opens for name, reader in self._readers.items()}

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._next()

    def state(self) -> dict[str, Any]:
        """State that a resumed run needs in addition to its step; every rank calls it between two
        steps. ``SampleOrder`` takes it as ``damaged``."""
        damaged = self._order.damaged if self._quarantine is None else self._quarantine.damaged()
        return {"damaged": {str(shard): epoch for shard, epoch in sorted(damaged.items())}}

    def close_streams(self, names: Sequence[str]) -> None:
        """Stop reading these streams for good; batches that were read ahead lose them too."""
        self._open -= set(names)
        running = []
        for batch in self._pending:
            running += [task.damaged for task in batch.tasks if task.stream in names]
            batch.tasks = [task for task in batch.tasks if task.stream not in names]
            for name in names:
                batch.columns.pop(name, None)
        for name in names:  # reads that wait for storage to answer again stop waiting
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
                batch = self._read_across_epochs()
        except BaseException as error:
            self._error = error
            raise
        for reader in self._readers.values():
            reader.expire((batch.step + 1) * self._global_batch + self._slice[0])
        self._read_ahead()
        return batch

    def _read_ahead(self) -> None:
        """Submit batches until ``prefetch`` of them are being read. With quarantine, no batch that
        reaches into the next epoch: its shards are known only when the epoch ends."""
        while self._open and len(self._pending) < self._prefetch:
            step = self._next_step
            quarantine, next_batch = self._quarantine, (step + 1) * self._global_batch
            if quarantine is not None and next_batch > quarantine.epoch_end:
                return
            begin, end = (step * self._global_batch + place for place in self._slice)
            self._pending.append(self._submit(step, begin, end))
            self._next_step += 1
            if quarantine is None:  # with one, the order may change before the next batch
                self._index.prefetch(begin + self._global_batch, end + self._global_batch)

    def _submit(self, step: int, begin: int, end: int) -> _Pending:
        """Let the threads read the samples at positions ``begin`` to ``end``."""
        groups = self._index(begin, end)
        batch = _Pending(step, np.arange(begin, end, dtype=np.int64), {}, [])
        for name in self._streams_at(step):
            batch.columns[name] = self._readers[name].empty(end - begin)
        for name, columns in batch.columns.items():
            tasks = [groups] if self._threads == 1 else self._readers[name].split_into_tasks(groups)
            for task_groups in tasks:
                damaged = self._pool.submit(self._fill_collecting, name, columns, task_groups)
                batch.tasks.append(_Task(name, damaged))
        return batch

    def _fill_collecting(
        self, name: str, columns: Columns, groups: Sequence[ShardRows]
    ) -> list[ShardRows]:
        """Read the groups. With quarantine, return the damaged ones instead of raising."""
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

    def _fill(self, name: str, columns: Columns, groups: Sequence[ShardRows]) -> None:
        reader = self._readers[name]
        with cancel_when(reader.source.closed):
            reader.fill(columns, groups)

    def _streams_at(self, step: int) -> list[str]:
        return [
            name
            for name in self._readers
            if name in self._open and step < self._needed_until.get(name, step + 1)
        ]

    def _finish(self, batch: _Pending) -> Batch:
        """Wait for a batch. Raises the error of the first stream's first shard that has one,
        whichever thread failed first."""
        bad: set[int] = set()
        # Waiting for each task alone would wake this thread once per task.
        wait([task.damaged for task in batch.tasks], return_when=FIRST_EXCEPTION)
        try:
            for task in batch.tasks:
                for group in task.damaged.result():
                    bad |= set(group.places.tolist())
        except BaseException:
            self._cancel([task.damaged for task in batch.tasks])
            raise
        for place in sorted(bad):
            assert self._quarantine is not None
            self._read_or_replace(self._quarantine, batch, place)
        return Batch(batch.step, batch.positions, batch.columns)

    def _read_or_replace(self, quarantine: Quarantine, batch: _Pending, place: int) -> None:
        """Read the sample at ``place`` alone, or the next readable one of its epoch. Only damage
        found here is recorded, because it does not depend on how far ahead the threads are."""
        position = int(batch.positions[place])
        for shard, row, expires_at in quarantine.candidates(position, batch.columns):
            at = np.array([place])
            sample = [ShardRows(shard, np.array([row]), at, expires_at, position - place)]
            for name, columns in batch.columns.items():
                try:
                    self._fill(name, columns, sample)
                except DamagedShardError as error:
                    quarantine.add(name, shard, row, error)
                    break
            else:
                return
        raise UserError(f"no sample of an epoch can be read: {VERIFY_HINT}")

    def _read_across_epochs(self) -> Batch:
        """The next batch when an epoch ends at its begin or inside it. Its part of the old epoch is
        read first; then all ranks agree on the shards that the new epoch leaves out."""
        quarantine = self._quarantine
        assert quarantine is not None  # without it every batch is read ahead
        step = self._next_step
        self._next_step += 1
        position, last = step * self._global_batch, (step + 1) * self._global_batch
        begin, end = position + self._slice[0], position + self._slice[1]
        parts = []
        while position < last:
            if position == quarantine.epoch_end:
                quarantine.finish_epoch()
                continue
            part_end = min(quarantine.epoch_end, last)
            first, stop = max(position, begin), min(part_end, end)
            parts.append(self._finish(self._submit(step, min(first, stop), stop)))
            position = part_end
        return _concatenate(parts)

    @staticmethod
    def _cancel(tasks: Sequence[Future[list[ShardRows]]]) -> None:
        """Cancel tasks that have not begun and wait for the others."""
        wait([task for task in tasks if not task.cancel()])


def _concatenate(parts: Sequence[Batch]) -> Batch:
    columns = {
        stream: {
            name: np.concatenate([part.columns[stream][name] for part in parts])
            for name in parts[0].columns[stream]
        }
        for stream in parts[0].columns
    }
    positions = np.concatenate([part.positions for part in parts])
    return Batch(parts[0].step, positions, columns)


def group_by_shard(order: SampleOrder, begin: int, end: int) -> list[ShardRows]:
    """The samples at positions ``begin`` to ``end`` of the run, by shard, rows ascending. Places
    count from ``begin``."""
    if begin == end:
        return []
    shards, rows, ends = order.locate_windows(np.arange(begin, end, dtype=np.int64))
    places = np.lexsort((rows, shards))  # neighbouring rows of a file become one request
    shards, rows, ends = shards[places], rows[places], ends[places]
    starts = np.flatnonzero(np.diff(shards, prepend=-1))
    firsts = starts.tolist()
    spans = zip(firsts, [*firsts[1:], len(places)], strict=True)
    expiries = np.maximum.reduceat(ends, starts).tolist()
    return [
        ShardRows(shard, rows[first:stop], places[first:stop], expires_at, begin)
        for shard, (first, stop), expires_at in zip(
            shards[starts].tolist(), spans, expiries, strict=True
        )
    ]


class IndexPrefetcher:
    """``group_by_shard`` of an order that does not change, computed in advance by a thread.

    It is little work in many small steps, for which a training step should not wait.
    """

    def __init__(self, order: SampleOrder, threads: Executor) -> None:
        self._order = order
        self._threads = threads
        self._next: tuple[tuple[int, int], Future[list[ShardRows]]] | None = None

    def __call__(self, begin: int, end: int) -> list[ShardRows]:
        """The prefetched result if a thread has begun with it; else computed here."""
        prefetched, self._next = self._next, None
        if prefetched is not None:
            span, groups = prefetched
            if not groups.cancel() and span == (begin, end):
                return groups.result()
        return group_by_shard(self._order, begin, end)

    def prefetch(self, begin: int, end: int) -> None:
        """Let a thread compute the next result."""
        future = self._threads.submit(group_by_shard, self._order, begin, end)
        self._next = (begin, end), future
