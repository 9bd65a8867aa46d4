"""From a position in the run to a rank's slice of the global batch, read ahead by threads."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.storage.retry import wanted_until
from pipeline.store.damage import DamagedShardError, LostShardError
from pipeline.store.disk import DiskCache
from pipeline.store.memory import Budget
from pipeline.store.order import SampleOrder
from pipeline.store.reader import Columns, StreamReader
from pipeline.store.source import FileSource, for_share
from pipeline.store.store import Store
from schemas.errors import UserError
from schemas.run import DataConfig, OnBadShard

Agree = Callable[[set[int]], set[int]]
"""The union of what all ranks pass; every rank calls it at the same steps."""

GIGA = 1_000_000_000

BAD_SHARDS = 10
BAD_SHARE = 10
"""More damaged shards than so many, and than one in so many of the store's, are no accident."""

CHECK = "check the store with: python -m pipeline.inspect STORE --verify"

LOOK_AHEAD = 256
"""Places of samples that are made out at once in search of one that can be read."""


@dataclass(frozen=True)
class Batch:
    """One rank's slice of one global batch."""

    step: int
    positions: np.ndarray
    """int64 (B,): place of each sample in the run's endless order, which seeds its randomness."""
    columns: Mapping[str, Mapping[str, np.ndarray]]
    """stream -> column -> array (B, ...)."""


class _Task(NamedTuple):
    """Rows of one stream and shard that a thread puts into a batch."""

    stream: str
    places: np.ndarray
    done: Future[None]


class _Unreadable:
    """What was found to be unreadable in an epoch, so as not to try it again. Whole shards are
    remembered as such: a file that is away would otherwise be asked for once per sample."""

    def __init__(self) -> None:
        self._shards: set[tuple[str, int]] = set()
        self._samples: set[tuple[str, int, int]] = set()

    def add(self, stream: str, shard: int, row: int, error: DamagedShardError) -> None:
        if isinstance(error, LostShardError):
            self._shards.add((stream, shard))
        else:
            self._samples.add((stream, shard, row))

    def knows(self, streams: Iterable[str], shard: int, row: int) -> bool:
        return any(
            (name, shard) in self._shards or (name, shard, row) in self._samples for name in streams
        )


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


def most_bad_shards(shards: int) -> int:
    """How many shards of a store may be quarantined; of a very small one, half."""
    return max(shards // BAD_SHARE, min(BAD_SHARDS, shards // 2))


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
    it costs less, only the wanted rows are read (``pipeline.store.source.for_share``). None of
    this changes what a batch holds.

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
    ) -> None:
        """``needed_until[stream]`` is a step, known beforehand, from which on it is not read.
        ``order`` must know of the shards that the run has quarantined so far."""
        self._order = order
        self._global_batch = global_batch
        self._slice = rank_slice(global_batch, rank, world_size)
        self._next_step = start_step
        self._needed_until = dict(needed_until or {})
        self._prefetch = prefetch
        self.budget = Budget(memory)
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
            self._readers[name] = StreamReader(store, name, verify=verify, source=source)
        self._open = set(streams)
        self._pending: deque[_Pending] = deque()
        self._error: BaseException | None = None
        self._quarantines = on_bad_shard == "quarantine"
        self._agree = agree
        self._found: set[int] = set()  # damaged shards that this rank met in this epoch
        self._unreadable = _Unreadable()
        self._epoch = order.epoch_of(start_step * global_batch)
        self._check_share()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="batch-loader")
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
        if self._quarantines:
            self._found = self._agree(self._found)
            self._check_share()
        found = dict.fromkeys(self._found - self._order.damaged.keys(), self._epoch)
        return {"damaged": {str(s): e for s, e in sorted({**found, **self._order.damaged}.items())}}

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
            if self._quarantines:
                end = self._order.epoch_span(self._epoch)[1]
                if (step + 1) * self._global_batch > end:
                    return
            begin, end = self._slice
            first = step * self._global_batch
            self._pending.append(self._begin(step, first + begin, first + end))
            self._next_step += 1

    def _begin(self, step: int, begin: int, end: int) -> _Pending:
        """Let the threads read the samples at positions ``begin`` to ``end``."""
        positions = np.arange(begin, end, dtype=np.int64)
        shards, rows, until = self._order.locate_windows(positions)
        groups = [np.flatnonzero(shards == shard) for shard in np.unique(shards)]
        batch = _Pending(step, positions, {}, [])
        for name in self._needed(step):
            batch.columns[name] = self._readers[name].empty(len(positions))
        for places in groups:  # each shard of all streams before the next: zips need both anyway
            for name, columns in batch.columns.items():
                done = self._pool.submit(
                    self._fill,
                    name,
                    columns,
                    int(shards[places[0]]),
                    rows[places],
                    places,
                    int(until[places].max()),
                )
                batch.tasks.append(_Task(name, places, done))
        return batch

    def _fill(
        self,
        name: str,
        columns: Columns,
        shard: int,
        rows: np.ndarray,
        places: np.ndarray,
        until: int,
    ) -> None:
        reader = self._readers[name]
        with wanted_until(reader.source.closed):
            reader.fill(columns, shard, rows, places, until)

    def _needed(self, step: int) -> list[str]:
        return [
            name
            for name in self._readers
            if name in self._open and step < self._needed_until.get(name, step + 1)
        ]

    def _finish(self, batch: _Pending) -> Batch:
        """Wait for a batch. Raises the first error in the order of its tasks, whoever was first in
        time, unless bad shards are to be left out."""
        bad: set[int] = set()
        try:
            for task in batch.tasks:
                try:
                    task.done.result()
                except DamagedShardError:
                    if not self._quarantines:
                        raise
                    bad |= set(task.places.tolist())
        except BaseException:
            self._cancel([task.done for task in batch.tasks])
            raise
        for place in sorted(bad):
            self._substitute(batch, place)
        return Batch(batch.step, batch.positions, batch.columns)

    def _substitute(self, batch: _Pending, place: int) -> None:
        """Read the sample at ``place`` by itself or, if it cannot be, the next one of its epoch
        that can. Only what is read here counts as found: it is the same however far ahead the
        threads are."""
        for shard, row, until in self._following(int(batch.positions[place]), batch.columns):
            at, where = np.array([row]), np.array([place])
            for name, columns in batch.columns.items():
                try:
                    self._fill(name, columns, shard, at, where, until)
                except DamagedShardError as error:
                    self._unreadable.add(name, shard, row, error)
                    self._note_damage(shard, error)
                    break
            else:
                return
        raise UserError(f"no sample of an epoch can be read: {CHECK}")

    def _following(self, position: int, streams: Iterable[str]) -> Iterator[tuple[int, int, int]]:
        """Shard, row and end of the window of the sample at ``position`` and of those behind it, up
        to the end of the epoch and then from its beginning, but for those that were found
        unreadable in one of ``streams``. To know that already changes nothing but time."""
        start, end = self._order.epoch_span(self._order.epoch_of(position))
        size = end - start
        for begin in range(0, size, LOOK_AHEAD):
            offsets = np.arange(begin, min(begin + LOOK_AHEAD, size))
            shards, rows, until = self._order.locate_windows(
                start + (position - start + offsets) % size
            )
            for sample in zip(shards.tolist(), rows.tolist(), until.tolist(), strict=True):
                if not self._unreadable.knows(streams, *sample[:2]):
                    yield sample

    def _note_damage(self, shard: int, error: DamagedShardError) -> None:
        if shard in self._found:
            return
        self._found.add(shard)
        _note(f"{error}; left out from epoch {self._epoch + 1} on")
        self._check_share()

    def _check_share(self) -> None:
        """Raises ``UserError`` where more is to be left out than a few bad shards."""
        damaged = len(self._found | self._order.damaged.keys())
        shards = int(np.count_nonzero(self._order.sizes))
        if self._quarantines and damaged > most_bad_shards(shards):
            raise UserError(
                f"{damaged} of the store's {shards} shards cannot be read: that is more than a few "
                f"bad shards; {CHECK}"
            )

    def _across_epochs(self) -> Batch:
        """The batch of the next step, in which an epoch ends or before which one has ended, once
        its last part is read and all ranks know of all that is to be left out of the next."""
        step = self._next_step
        self._next_step += 1
        at, last = step * self._global_batch, (step + 1) * self._global_batch
        begin, end = at + self._slice[0], at + self._slice[1]
        parts = []
        while at < last:
            epoch_end = self._order.epoch_span(self._epoch)[1]
            if at == epoch_end:
                self._turn_epoch()
                continue
            until = min(epoch_end, last)
            first, behind = max(at, begin), min(until, end)
            parts.append(self._finish(self._begin(step, min(first, behind), behind)))
            at = until
        return _joined(parts)

    def _turn_epoch(self) -> None:
        self._found = self._agree(self._found)
        self._check_share()
        self._order.leave_out(dict.fromkeys(self._found, self._epoch))
        self._found = set()
        self._unreadable = _Unreadable()
        self._epoch += 1

    @staticmethod
    def _cancel(tasks: Sequence[Future[None]]) -> None:
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


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")
