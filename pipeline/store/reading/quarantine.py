"""Training on without shards that cannot be read: which they are, what takes their place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from pipeline.store.errors import DamagedShardError, LostShardError
from pipeline.store.reading.sample_order import SampleOrder
from schemas.errors import UserError

Agree = Callable[[set[int]], set[int]]
"""The union of what all ranks pass; every rank calls it at the same steps."""

BAD_SHARDS = 10
BAD_SHARE = 10
"""More damaged shards than so many, and than one in so many of the store's, are no accident."""

CHECK = "check the store with: python -m pipeline.inspect STORE --verify"

LOOK_AHEAD = 256
"""Places of samples that are made out at once in search of one that can be read."""


def most_bad_shards(shards: int) -> int:
    """How many shards of a store may be quarantined; of a very small one, half."""
    return max(shards // BAD_SHARE, min(BAD_SHARDS, shards // 2))


class Quarantine:
    """What was found to be damaged in an epoch, to be left out of the next one.

    Which samples cannot be read is a property of the store, so that any number of ranks leaves out
    the same ones once they have agreed. Where more shards are bad than a few, every method that
    learns of it raises ``UserError``, the constructor too.
    """

    def __init__(self, order: SampleOrder, position: int, agree: Agree) -> None:
        """``order`` knows of the shards that are left out so far; ``position`` is the next sample's
        place in it."""
        self._order = order
        self._agree = agree
        self._epoch = order.epoch_of(position)
        self._found: set[int] = set()  # shards that this rank met in this epoch
        self._unreadable = _Unreadable()
        self._check_share()

    @property
    def epoch_end(self) -> int:
        """The position behind the last sample of the epoch."""
        return self._order.epoch_span(self._epoch)[1]

    def damaged(self) -> dict[int, int]:
        """Every shard that is damaged, and the epoch in which that was found; every rank calls it
        between two steps."""
        self._found = self._agree(self._found)
        self._check_share()
        return dict.fromkeys(self._found, self._epoch) | self._order.damaged

    def turn_epoch(self) -> None:
        """The epoch has been read to its end; every rank calls it."""
        self._found = self._agree(self._found)
        self._check_share()
        self._order.leave_out(dict.fromkeys(self._found, self._epoch))
        self._found = set()
        self._unreadable = _Unreadable()
        self._epoch += 1

    def add(self, stream: str, shard: int, row: int, error: DamagedShardError) -> None:
        """A sample could not be read."""
        self._unreadable.add(stream, shard, row, error)
        if shard not in self._found:
            self._found.add(shard)
            sys.stderr.write(f"{error}; left out from epoch {self._epoch + 1} on\n")
            self._check_share()

    def following(self, position: int, streams: Iterable[str]) -> Iterator[tuple[int, int, int]]:
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

    def _check_share(self) -> None:
        damaged = len(self._found | self._order.damaged.keys())
        shards = int(np.count_nonzero(self._order.sizes))
        if damaged > most_bad_shards(shards):
            raise UserError(
                f"{damaged} of the store's {shards} shards cannot be read: that is more than a few "
                f"bad shards; {CHECK}"
            )


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
