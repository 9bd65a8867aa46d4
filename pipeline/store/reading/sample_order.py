"""Order of samples: a pure function of (seed, position) and the shard sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeline.randomness import Purpose, generator
from schemas.errors import UserError


class _Section(NamedTuple):
    """Epochs that leave out the same shards, up to the first epoch of the next section."""

    epoch: int
    """Its first epoch."""
    position: int
    """Position of the first sample of that epoch."""
    size: int
    """Samples of each of its epochs."""
    left_out: np.ndarray
    """int64: shards."""


class _Epoch(NamedTuple):
    start: int
    """Position of its first sample."""
    size: int
    shards: np.ndarray
    """int32, in reading order."""
    windows: np.ndarray
    """int64: begin of each window relative to ``start``, followed by ``size``."""


class SampleOrder:
    """The endless sequence of samples of a run.

    Each epoch permutes the shards, then shuffles samples inside windows of ``window`` consecutive
    shards, so that a reader needs only that many shards at a time. ``position`` counts samples
    since the start of the run and is the whole state of the data; epochs follow without a gap.
    An epoch costs time and memory in proportion to its shards; the position does not matter.

    Safe to call from several threads, except ``leave_out``.
    """

    def __init__(
        self,
        seed: int,
        samples_per_shard: Sequence[int] | np.ndarray,
        window: int = 8,
        damaged: Mapping[int, int] | None = None,
    ) -> None:
        """``damaged[shard]`` is the epoch in which a shard was found damaged; later epochs leave it
        out. Raises ``ValueError`` when the store holds no samples."""
        self.seed = seed
        self.sizes = np.asarray(samples_per_shard, dtype=np.int32)
        self.window = window
        self.epoch_size = int(self.sizes.sum(dtype=np.int64))
        """Samples of an epoch without left-out shards."""
        if self.epoch_size == 0:
            raise ValueError("the store holds no samples")
        # A batch spans at most two epochs longer than itself, and two windows of each.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)
        self.damaged: dict[int, int] = {}
        self._sections = [_Section(0, 0, self.epoch_size, np.empty(0, np.int64))]
        self.leave_out(damaged or {})

    def leave_out(self, damaged: Mapping[int, int]) -> None:
        """Leave out more shards, each from the epoch after the one in which it was found damaged.

        Positions up to the end of the earliest of these epochs keep their samples. Raises
        ``UserError`` when no sample would be left.
        """
        for shard, epoch in damaged.items():
            if not 0 <= shard < len(self.sizes):
                raise ValueError(f"there is no shard {shard}")
            self.damaged[shard] = min(epoch, self.damaged.get(shard, epoch))
        sections = self._sections[:1]
        for found in sorted(set(self.damaged.values())):
            shards = np.array(sorted(s for s, e in self.damaged.items() if e <= found), np.int64)
            size = self.epoch_size - int(self.sizes[shards].sum(dtype=np.int64))
            if size == 0:
                raise UserError("every shard of the store is damaged: extract it again")
            last = sections[-1]
            position = last.position + (found + 1 - last.epoch) * last.size
            sections.append(_Section(found + 1, position, size, shards))
        self._sections = sections
        self._epoch.cache_clear()
        self._window.cache_clear()

    def epoch_of(self, position: int) -> int:
        section = self._section_at(position)
        return section.epoch + (position - section.position) // section.size

    def epochs_of(self, positions: np.ndarray) -> np.ndarray:
        """Epoch of each position, int64 of the shape of ``positions``."""
        epochs = np.empty_like(positions)
        todo = np.ones(len(positions), bool)
        while todo.any():  # a batch spans few epochs
            epoch = self.epoch_of(int(positions[todo].min()))
            inside = todo & (positions < self.epoch_span(epoch)[1])
            epochs[inside] = epoch
            todo &= ~inside
        return epochs

    def epoch_span(self, epoch: int) -> tuple[int, int]:
        """Positions of the first sample of an epoch and of the first one of the next epoch."""
        section = next(s for s in reversed(self._sections) if s.epoch <= epoch)
        start = section.position + (epoch - section.epoch) * section.size
        return start, start + section.size

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of each position, int64 arrays of the shape of ``positions``."""
        shards, rows, _ = self.locate_windows(positions)
        return shards, rows

    def locate_windows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, row and end of the window (a position) of each position. From that end on, the
        shard is not needed before the next epoch."""
        shards = np.empty_like(positions)
        rows = np.empty_like(positions)
        ends = np.empty_like(positions)
        todo = np.arange(len(positions))
        while len(todo):
            epoch = self.epoch_of(int(positions[todo].min()))
            table = self._epoch(epoch)
            offsets = positions[todo] - table.start
            inside = offsets < table.size
            chosen, offsets = todo[inside], offsets[inside]
            todo = todo[~inside]
            windows = np.searchsorted(table.windows, offsets, side="right") - 1
            ends[chosen] = table.start + table.windows[windows + 1]
            for number in np.unique(windows).tolist():
                of_window = windows == number
                shard, row = self._window(epoch, number)
                local = offsets[of_window] - table.windows[number]
                at = chosen[of_window]
                shards[at], rows[at] = shard[local], row[local]
        return shards, rows, ends

    def _section_at(self, position: int) -> _Section:
        return next(s for s in reversed(self._sections) if s.position <= position)

    def _make_epoch(self, epoch: int) -> _Epoch:
        start, end = self.epoch_span(epoch)
        rng = generator(Purpose.SHARD_ORDER, self.seed, epoch)
        shards = rng.permutation(len(self.sizes)).astype(np.int32)
        left_out = next(s.left_out for s in reversed(self._sections) if s.epoch <= epoch)
        if len(left_out):
            shards = shards[~np.isin(shards, left_out)]
        ends = np.cumsum(self.sizes[shards], dtype=np.int64)
        inner = ends[self.window - 1 : -1 : self.window]
        return _Epoch(start, end - start, shards, np.concatenate([[0], inner, [end - start]]))

    def _make_window(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards and rows of one window, shuffled."""
        shards = self._epoch(epoch).shards[number * self.window : (number + 1) * self.window]
        sizes = self.sizes[shards]
        shard = np.repeat(shards, sizes)
        row = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
        order = generator(Purpose.SAMPLE_ORDER, self.seed, epoch, number).permutation(len(shard))
        return shard[order], row[order]
