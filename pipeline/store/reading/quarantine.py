"""Quarantine: a run continues without damaged shards and replaces their samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from pipeline.store.errors import DamagedShardError, LostShardError
from pipeline.store.reading.sample_order import SampleOrder
from schemas.errors import UserError

logger = logging.getLogger(__name__)

Agree = Callable[[set[int]], set[int]]
"""The union of the sets that all ranks pass; every rank calls it at the same steps."""

MAX_BAD_SHARDS = 10
MAX_BAD_PERCENT = 10
"""With more damaged shards than both limits allow, the store itself is assumed broken."""

VERIFY_HINT = "check the store with: python -m pipeline.inspect STORE --verify"

CANDIDATES_AT_ONCE = 256
"""Positions that are located at once in the search for a readable sample."""


def max_bad_shards(shards: int) -> int:
    """Shards of a store that may be quarantined; half of a store with fewer than 20 shards."""
    return max(shards * MAX_BAD_PERCENT // 100, min(MAX_BAD_SHARDS, shards // 2))


class Quarantine:
    """Shards found damaged in one epoch, which the next epochs leave out.

    Whether a sample can be read is a property of the store, so that any number of ranks leaves out
    the same shards once the ranks have agreed. Every method that learns of a damaged shard, and
    the constructor, raises ``UserError`` above the limit of ``max_bad_shards``.
    """

    def __init__(self, order: SampleOrder, position: int, agree: Agree) -> None:
        """``order`` already leaves out the shards quarantined so far; ``position`` is the position
        of the next sample in it."""
        self._order = order
        self._agree = agree
        self._epoch = order.epoch_of(position)
        self._found: set[int] = set()  # shards that this rank found damaged in this epoch
        self._unreadable = _Unreadable()
        self._check_limit()

    @property
    def epoch_end(self) -> int:
        """The position after the last sample of the epoch."""
        return self._order.epoch_span(self._epoch)[1]

    def damaged(self) -> dict[int, int]:
        """Damaged shards -> the epoch in which each was found; every rank calls it between two
        steps."""
        self._found = self._agree(self._found)
        self._check_limit()
        return dict.fromkeys(self._found, self._epoch) | self._order.damaged

    def finish_epoch(self) -> None:
        """Leave the shards found in this epoch out of the next one; every rank calls it."""
        self._found = self._agree(self._found)
        self._check_limit()
        self._order.leave_out(dict.fromkeys(self._found, self._epoch))
        self._found = set()
        self._unreadable = _Unreadable()
        self._epoch += 1

    def add(self, stream: str, shard: int, row: int, error: DamagedShardError) -> None:
        """Record a sample that could not be read."""
        self._unreadable.add(stream, shard, row, error)
        if shard not in self._found:
            self._found.add(shard)
            logger.warning("%s; left out from epoch %d on", error, self._epoch + 1)
            self._check_limit()

    def candidates(self, position: int, streams: Iterable[str]) -> Iterator[tuple[int, int, int]]:
        """(shard, row, end of its window) of the sample at ``position`` and of the following ones,
        up to the end of the epoch and then from its beginning. Samples already found unreadable in
        one of ``streams`` are skipped; that saves time and does not change which sample is read."""
        start, end = self._order.epoch_span(self._order.epoch_of(position))
        size = end - start
        for begin in range(0, size, CANDIDATES_AT_ONCE):
            offsets = np.arange(begin, min(begin + CANDIDATES_AT_ONCE, size))
            shards, rows, ends = self._order.locate_windows(
                start + (position - start + offsets) % size
            )
            for sample in zip(shards.tolist(), rows.tolist(), ends.tolist(), strict=True):
                if not self._unreadable.contains(streams, *sample[:2]):
                    yield sample

    def _check_limit(self) -> None:
        damaged = len(self._found | self._order.damaged.keys())
        shards = int(np.count_nonzero(self._order.sizes))
        if damaged > max_bad_shards(shards):
            raise UserError(
                f"{damaged} of the store's {shards} shards cannot be read: that is more than a few "
                f"bad shards; {VERIFY_HINT}"
            )


class _Unreadable:
    """Samples found unreadable in an epoch, so that they are not tried again. A lost shard is
    recorded as a whole, because its missing file would otherwise be requested once per sample."""

    def __init__(self) -> None:
        self._shards: set[tuple[str, int]] = set()
        self._samples: set[tuple[str, int, int]] = set()

    def add(self, stream: str, shard: int, row: int, error: DamagedShardError) -> None:
        if isinstance(error, LostShardError):
            self._shards.add((stream, shard))
        else:
            self._samples.add((stream, shard, row))

    def contains(self, streams: Iterable[str], shard: int, row: int) -> bool:
        return any(
            (name, shard) in self._shards or (name, shard, row) in self._samples for name in streams
        )
