"""The held-out part of a store: a pure function of the samples' keys.

A key's rank is 64 bits of its BLAKE2b hash; the part with ranks below a fraction of 2^64 is held
out. So it does not depend on shards, order, codec or seed, and a larger part contains a smaller.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.store.store import Store
from schemas.errors import UserError

THREADS = 16
"""Commit records that are read at the same time."""


class RankedSamples(NamedTuple):
    """Samples by ascending rank of their keys."""

    ranks: np.ndarray
    """uint64 (N,)."""
    shards: np.ndarray
    """int64 (N,)."""
    rows: np.ndarray
    """int64 (N,), rows of the shards."""

    def first(self, count: int) -> RankedSamples:
        """The samples of the ``count`` lowest ranks, or all."""
        return RankedSamples(*(values[:count] for values in self))

    def by_shard(self) -> dict[int, np.ndarray]:
        """Ascending rows of each shard that has some."""
        shards = np.unique(self.shards).tolist()
        return {shard: np.sort(self.rows[self.shards == shard]) for shard in shards}


def key_rank(key: str) -> int:
    """The rank of a sample's key, 0 to 2^64 - 1."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


class Workers(Protocol):
    """The workers of a run: see ``ProcessGroup``."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def concatenate(self, rows: np.ndarray) -> np.ndarray: ...

    def sum_counts(self, counts: dict[str, int]) -> dict[str, int]: ...


def ranked_samples(
    store: Store, fraction: float = 1.0, workers: Workers | None = None
) -> RankedSamples:
    """The samples whose rank is below ``fraction`` of 2^64. All commit records are read, by each of
    the ``workers``, which all call this, an equal part. Raises ``UserError`` where one is missing
    or damaged."""
    shards = range(store.manifest.num_shards)
    if workers is None or workers.world_size == 1:
        return _sorted(_find(store, shards, fraction))
    failed, own = 0, np.empty((0, 3), np.int64)
    try:
        own = _find(store, shards[workers.rank :: workers.world_size], fraction)
    except UserError:
        failed = 1
    if workers.sum_counts({"failed": failed})["failed"]:
        return ranked_samples(store, fraction)  # so that each worker raises the same error
    return _sorted(workers.concatenate(own))


def _find(store: Store, shards: range, fraction: float) -> np.ndarray:
    """Rank, whose 64 bits are taken as a signed number, shard and row: int64 (n, 3)."""
    limit = int(fraction * 2**64)

    def find(shard: int) -> np.ndarray:
        keys = store.record(shard).keys
        found = [(rank, row) for row, key in enumerate(keys) if (rank := key_rank(key)) < limit]
        out = np.full((len(found), 3), shard, np.int64)
        out[:, 0] = np.array([rank for rank, _ in found], np.uint64).view(np.int64)
        out[:, 2] = [row for _, row in found]
        return out

    with ThreadPoolExecutor(THREADS, thread_name_prefix="holdout") as pool:
        return np.concatenate([np.empty((0, 3), np.int64), *pool.map(find, shards)])


def _sorted(found: np.ndarray) -> RankedSamples:
    ranks, shards, rows = found[:, 0].view(np.uint64), found[:, 1], found[:, 2]
    order = np.lexsort((rows, shards, ranks))
    return RankedSamples(ranks[order], shards[order], rows[order])
