"""The held-out part of a store: a pure function of the samples' keys.

A key's rank is 64 bits of its BLAKE2b hash; the part with ranks below a fraction of 2^64 is held
out. So it does not depend on shards, order, codec or seed, and a larger part contains a smaller.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from pipeline.store.store import Store

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


def ranked_samples(store: Store, fraction: float = 1.0) -> RankedSamples:
    """The samples whose rank is below ``fraction`` of 2^64; reads all commit records. Raises
    ``UserError`` where one is missing or damaged."""
    limit = int(fraction * 2**64)

    def find(shard: int) -> list[tuple[int, int, int]]:
        ranks = map(key_rank, store.record(shard).keys)
        return [(rank, shard, row) for row, rank in enumerate(ranks) if rank < limit]

    with ThreadPoolExecutor(THREADS, thread_name_prefix="holdout") as pool:
        found = sorted(
            sample for some in pool.map(find, range(store.manifest.num_shards)) for sample in some
        )
    ranks, shards, rows = zip(*found, strict=True) if found else ((), (), ())
    return RankedSamples(
        np.array(ranks, np.uint64), np.array(shards, np.int64), np.array(rows, np.int64)
    )
