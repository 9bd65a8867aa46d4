"""Requests for rows of a shard: per shard, as the loader makes them, and per file of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.store.reading.shard_index import FileTable

Columns = dict[str, np.ndarray]
"""Stored array name -> (B, *shape), contiguous."""


class ShardRows(NamedTuple):
    """Rows of one shard, and their places in a batch."""

    shard: int
    rows: np.ndarray
    """int64 (n,), best ascending because neighbouring rows are read with one request."""
    places: np.ndarray
    """int64 (n,): index of each row in the batch."""
    expires_at: int = 0
    """Sample position of the run from which on the shard's cached bytes are not needed any more
    (the end of its shuffle window)."""
    start: int = 0
    """Sample position of the run that has place 0 of the batch."""


@dataclass(frozen=True, slots=True)
class RowRequest:
    """Rows of one file of a shard, to be read into their places of a batch."""

    file: FileTable
    out: Columns
    shard: int
    rows: np.ndarray
    """int64 (n,)"""
    places: np.ndarray
    """int64 (n,): index of each row in the arrays of ``out``."""
    check: list[bool] | None
    """True for each row whose checksum is verified; None for none of them."""
    expires_at: int
    """As in ``ShardRows``."""
