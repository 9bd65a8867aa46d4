"""Which rows of which shards a batch is made of, worked out while the one before is used."""

from __future__ import annotations

from concurrent.futures import Executor, Future

import numpy as np

from pipeline.store.order import SampleOrder
from pipeline.store.reader import Rows


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


class Planner:
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
