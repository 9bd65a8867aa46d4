"""From a position in the run to a rank's slice of the global batch, read ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.store.order import SampleOrder
from pipeline.store.reader import StreamReader
from pipeline.store.store import Store


@dataclass(frozen=True)
class Batch:
    """One rank's slice of one global batch."""

    step: int
    positions: np.ndarray
    """int64 (B,): place of each sample in the run's endless order, which seeds its randomness."""
    columns: Mapping[str, Mapping[str, np.ndarray]]
    """stream -> column -> array (B, ...)."""


def rank_slice(global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Begin and end of a rank's samples in a global batch; unequal where it does not divide."""
    return global_batch * rank // world_size, global_batch * (rank + 1) // world_size


class BatchLoader:
    """Iterates over the batches of steps ``start_step``, ``start_step + 1``, ... without end.

    A thread reads ahead by ``prefetch`` batches. Streams can be closed at any step; when
    ``close_streams`` returns, no byte of them is read any more.
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
    ) -> None:
        """``needed_until[stream]`` is a step, known beforehand, from which on it is not read."""
        self._order = order
        self._global_batch = global_batch
        self._slice = rank_slice(global_batch, rank, world_size)
        self._start_step = start_step
        self._needed_until = dict(needed_until or {})
        self._readers = {
            name: StreamReader(store, name, verify=verify, cache_files=order.window)
            for name in streams
        }
        self._open = set(streams)
        self._reading = threading.Lock()  # held while any stream is read or closed
        self._stop = threading.Event()
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=prefetch)
        self._thread = threading.Thread(target=self._run, name="batch-loader", daemon=True)
        self._thread.start()

    @property
    def bytes_read(self) -> dict[str, int]:
        """Bytes asked of storage so far, per stream, closed ones included."""
        return {name: reader.bytes_read for name, reader in self._readers.items()}

    @property
    def opens(self) -> dict[str, int]:
        """Requests to storage so far, per stream, closed ones included."""
        return {name: reader.opens for name, reader in self._readers.items()}

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._queue.get()
            if isinstance(batch, BaseException):
                raise batch
            kept = {name: cols for name, cols in batch.columns.items() if name in self._open}
            yield Batch(batch.step, batch.positions, kept)

    def close_streams(self, names: Sequence[str]) -> None:
        """Stop reading these streams for good; batches that were read ahead lose them too."""
        with self._reading:
            for name in names:
                self._open.discard(name)
                self._readers[name].close()

    def close(self) -> None:
        """End the thread and close every stream."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self.close_streams(list(self._readers))

    def _run(self) -> None:
        step = self._start_step
        while not self._stop.is_set():
            try:
                item: Batch | BaseException = self._read(step)
            except BaseException as error:  # handed to the consumer, which raises it
                item = error
            self._queue.put(item)
            if isinstance(item, BaseException):
                return
            step += 1

    def _read(self, step: int) -> Batch:
        begin, end = self._slice
        positions = step * self._global_batch + np.arange(begin, end, dtype=np.int64)
        shards, rows = self._order.locate(positions)
        columns = {}
        for name, reader in self._readers.items():
            with self._reading:
                if name in self._open and step < self._needed_until.get(name, step + 1):
                    columns[name] = reader.read(shards, rows)
        return Batch(step, positions, columns)
