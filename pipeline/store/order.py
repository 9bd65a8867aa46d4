"""Which sample comes when: a pure function of (seed, position) and the shard sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.randomness import Purpose, generator


class SampleOrder:
    """The endless sequence of samples of a run.

    Each epoch permutes the shards, then shuffles samples inside windows of ``window`` consecutive
    shards, so that a reader needs only that many shards at hand. ``position`` counts samples since
    the start of the run and is the whole state of the data; epochs follow without a gap.
    """

    def __init__(self, seed: int, samples_per_shard: Sequence[int], window: int = 8) -> None:
        self.seed = seed
        self.sizes = np.asarray(samples_per_shard, dtype=np.int64)
        self.window = window
        self.epoch_size = int(self.sizes.sum())
        if self.epoch_size == 0:
            raise ValueError("the store holds no samples")
        self._epoch = -1  # what the derived tables below belong to
        self._shards = np.empty(0, np.int64)
        self._starts = np.empty(0, np.int64)
        self._windows: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of each position, int64 arrays of the shape of ``positions``."""
        shards = np.empty_like(positions)
        rows = np.empty_like(positions)
        epochs, offsets = np.divmod(positions, self.epoch_size)
        for epoch in np.unique(epochs):
            self._enter_epoch(int(epoch))
            inside = epochs == epoch
            windows = np.searchsorted(self._starts, offsets[inside], side="right") - 1
            at = np.flatnonzero(inside)
            for number in np.unique(windows):
                chosen = at[windows == number]
                shard, row = self._window(int(number))
                local = offsets[chosen] - self._starts[number]
                shards[chosen], rows[chosen] = shard[local], row[local]
        return shards, rows

    def _enter_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self._shards = generator(Purpose.SHARD_ORDER, self.seed, epoch).permutation(len(self.sizes))
        ends = np.cumsum(self.sizes[self._shards])
        starts = np.concatenate([[0], ends])[: -1 : self.window]
        self._starts = starts.astype(np.int64)
        self._windows = {}

    def _window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards and rows of one window of the current epoch, shuffled."""
        if number not in self._windows:
            shards = self._shards[number * self.window : (number + 1) * self.window]
            sizes = self.sizes[shards]
            shard = np.repeat(shards, sizes)
            row = np.concatenate([np.arange(size) for size in sizes])
            rng = generator(Purpose.SAMPLE_ORDER, self.seed, self._epoch, number)
            order = rng.permutation(len(shard))
            if len(self._windows) >= 2:  # a batch spans two windows at most, one after the other
                self._windows.pop(next(iter(self._windows)))
            self._windows[number] = (shard[order], row[order])
        return self._windows[number]
