"""In-memory cache of readers: values expire at a position of the run, within a byte budget."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

V = TypeVar("V")

UNLIMITED = 1 << 62


class MemoryBudget:
    """Bytes that several caches may use together. Safe to use from several threads."""

    def __init__(self, limit: int = UNLIMITED) -> None:
        self.limit = limit
        self.used = 0
        self.peak = 0
        self._lock = threading.Lock()

    def reserve(self, size: int) -> bool:
        """Count ``size`` more bytes as used; False, and nothing changes, above the limit."""
        with self._lock:
            if self.used + size > self.limit:
                return False
            self.used += size
            self.peak = max(self.peak, self.used)
            return True

    def release(self, size: int) -> None:
        with self._lock:
            self.used -= size


class _Entry(Generic[V]):
    def __init__(self, size: int, expires_at: int) -> None:
        self.size = size
        self.expires_at = expires_at
        self.value: Future[V] = Future()


class SharedCache(Generic[V]):
    """Values by key, each loaded once however many threads ask for it at the same time.

    New values never evict old ones: a shuffle window uses its files in turn, so that the least
    recently used file would be needed next. ``get`` returns None when there is no room.
    """

    def __init__(self, budget: MemoryBudget | None = None) -> None:
        self._budget = budget or MemoryBudget()
        self._entries: OrderedDict[str | int, _Entry[V]] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self, key: str | int, load: Callable[[], V], *, size: int = 0, expires_at: int = 0
    ) -> V | None:
        """The value of ``key``, from ``load`` if it is not cached; None when the budget has no room
        for its ``size`` bytes. An error of ``load`` is raised for all threads that wait for the
        value, and not cached. ``expires_at`` is the position of the run from which on the value is
        not needed any more."""
        with self._lock:
            entry = self._entries.get(key)
            is_new = entry is None
            if entry is None:
                if not self._budget.reserve(size):
                    return None
                entry = self._entries[key] = _Entry(size, expires_at)
            entry.expires_at = max(entry.expires_at, expires_at)
            self._entries.move_to_end(key)
        if is_new:
            try:
                entry.value.set_result(load())
            except BaseException as error:
                self.discard(key)
                entry.value.set_exception(error)
        return entry.value.result()

    def __contains__(self, key: str | int) -> bool:
        return key in self._entries

    def discard(self, key: str | int) -> None:
        with self._lock:
            self._remove([key] if key in self._entries else [])

    def expire(self, position: int) -> None:
        """Remove values that are needed only before ``position``."""
        with self._lock:
            expired = [key for key, entry in self._entries.items() if entry.expires_at <= position]
            self._remove(expired)

    def shrink(self, count: int) -> None:
        """Remove all values but the ``count`` most recently used ones."""
        with self._lock:
            self._remove(list(self._entries)[: max(0, len(self._entries) - count)])

    def clear(self) -> None:
        self.shrink(0)

    def _remove(self, keys: list[str | int]) -> None:
        for key in keys:
            self._budget.release(self._entries.pop(key).size)
