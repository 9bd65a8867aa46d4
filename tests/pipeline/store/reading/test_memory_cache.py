"""Caches of readers: loaded once, within their bytes, for as long as they are needed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.store.reading.memory_cache import MemoryBudget, SharedCache


def test_what_is_asked_for_at_the_same_time_is_loaded_once() -> None:
    cache: SharedCache[str] = SharedCache()
    loads, begun, go_on = [], threading.Event(), threading.Event()

    def load() -> str:
        loads.append(1)
        begun.set()
        assert go_on.wait(10)
        return "value"

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(cache.get, "a", load)
        assert begun.wait(10)
        others = [pool.submit(cache.get, "a", load) for _ in range(3)]
        assert cache.get("b", lambda: "other") == "other"  # does not wait for them
        go_on.set()
        assert [future.result(10) for future in [first, *others]] == ["value"] * 4
    assert len(loads) == 1


def test_an_error_is_everybody_s_and_forgotten() -> None:
    cache: SharedCache[int] = SharedCache(budget := MemoryBudget(10))

    def fail() -> int:
        raise OSError("away")

    for _ in range(2):
        with pytest.raises(OSError, match="away"):
            cache.get("a", fail, size=10)
        assert budget.used == 0
    assert cache.get("a", lambda: 3, size=10) == 3


def test_what_has_no_room_is_not_loaded_and_pushes_nothing_out() -> None:
    budget = MemoryBudget(10)
    one, two = SharedCache[int](budget), SharedCache[int](budget)
    assert one.get("a", lambda: 1, size=6, expires_at=5) == 1
    assert two.get("b", lambda: 2, size=4, expires_at=9) == 2
    assert one.get("c", lambda: 3, size=1) is None
    assert one.get("a", lambda: 0, size=6, expires_at=7) == 1
    one.expire(5)
    assert budget.used == 10  # "a" has been asked for up to 7 meanwhile
    one.expire(7)
    assert (budget.used, budget.peak) == (4, 10)
    assert one.get("c", lambda: 3, size=6) == 3
    two.clear()
    assert budget.used == 6


def test_shrink_keeps_what_was_used_last() -> None:
    cache: SharedCache[int] = SharedCache()
    for key in ("a", "b", "c", "a"):
        cache.get(key, lambda: 0)
    cache.shrink(2)
    assert ["a" in cache, "b" in cache, "c" in cache] == [True, False, True]
