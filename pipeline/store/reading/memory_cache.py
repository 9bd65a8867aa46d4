"""What readers keep in memory for as long as it is needed, within a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

V = TypeVar("V")

UNLIMITED = 1 << 62


class MemoryBudget:
    """Bytes that several caches may hold together. Safe to use from several threads."""

    def __init__(self, limit: int = UNLIMITED) -> None:
        self.limit = limit
        self.used = 0
        self.peak = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Whether there is room for ``size`` more bytes, which then count as used."""
        with self._lock:
            if self.used + size > self.limit:
                return False
            self.used += size
            self.peak = max(self.peak, self.used)
            return True

    def give(self, size: int) -> None:
        with self._lock:
            self.used -= size


class _Entry(Generic[V]):
    def __init__(self, size: int, until: int) -> None:
        self.size = size
        self.until = until
        self.value: Future[V] = Future()


class SharedCache(Generic[V]):
    """Values by key, each loaded once however many threads ask for it at the same time.

    What is kept is not pushed out by what comes later: in a shuffle window files are used in turn,
    so that the one used longest ago would be the next to be needed. Where there is no room, ``get``
    says so, and the caller does without.
    """

    def __init__(self, budget: MemoryBudget | None = None) -> None:
        self._budget = budget or MemoryBudget()
        self._entries: OrderedDict[str | int, _Entry[V]] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self, key: str | int, load: Callable[[], V], *, size: int = 0, until: int = 0
    ) -> V | None:
        """The value of ``key``, from ``load`` where it is not there; None where its ``size`` bytes
        find no room. What ``load`` raises is raised for all who wait for it, and forgotten."""
        with self._lock:
            entry = self._entries.get(key)
            mine = entry is None
            if entry is None:
                if not self._budget.take(size):
                    return None
                entry = self._entries[key] = _Entry(size, until)
            entry.until = max(entry.until, until)
            self._entries.move_to_end(key)
        if mine:
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
            self._drop([key] if key in self._entries else [])

    def expire(self, position: int) -> None:
        """Let go of what is needed only before ``position``."""
        with self._lock:
            self._drop([key for key, entry in self._entries.items() if entry.until <= position])

    def shrink(self, count: int) -> None:
        """Let go of all but the ``count`` that were used last."""
        with self._lock:
            self._drop(list(self._entries)[: max(0, len(self._entries) - count)])

    def clear(self) -> None:
        self.shrink(0)

    def _drop(self, keys: list[str | int]) -> None:
        for key in keys:
            self._budget.give(self._entries.pop(key).size)
