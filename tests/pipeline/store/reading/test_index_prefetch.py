"""The rows of a batch are the same whichever thread computes them, and at any time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.store import SampleOrder
from pipeline.store.reading.batch_loader import IndexPrefetcher, group_by_shard
from pipeline.store.reading.row_request import ShardRows

SIZES = (7, 3, 0, 5, 9)


@pytest.fixture
def order() -> SampleOrder:
    return SampleOrder(3, SIZES, 2)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, thread_name_prefix="planner") as pool:
        yield pool


def same(one: list[ShardRows], other: list[ShardRows]) -> bool:
    return len(one) == len(other) and all(
        (a.shard, a.expires_at, a.rows.tolist(), a.places.tolist())
        == (b.shard, b.expires_at, b.rows.tolist(), b.places.tolist())
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("begin", "end"), [(0, 5), (5, 10), (20, 31), (11, 90), (4, 4)])
def test_every_position_has_its_row_once(order: SampleOrder, begin: int, end: int) -> None:
    shards, rows, ends = order.locate_windows(np.arange(begin, end))
    found = group_by_shard(order, begin, end)
    assert [some.shard for some in found] == sorted(set(shards.tolist()))
    for some in found:
        assert some.rows.tolist() == sorted(some.rows.tolist()) == rows[some.places].tolist()
        assert set(shards[some.places].tolist()) == {some.shard}
        assert some.expires_at == ends[some.places].max()
    places = np.concatenate([np.empty(0, int), *(some.places for some in found)])
    assert sorted(places.tolist()) == list(range(end - begin))


def test_what_is_expected_is_worked_out_by_the_thread(
    order: SampleOrder, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    by: list[str] = []
    plain = SampleOrder.locate_windows

    def noting(self: SampleOrder, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        by.append(threading.current_thread().name)
        return plain(self, positions)

    monkeypatch.setattr(SampleOrder, "locate_windows", noting)
    planner = IndexPrefetcher(order, threads)
    for begin in (0, 6, 12):
        found = planner(begin, begin + 6)
        planner.prefetch(begin + 6, begin + 12)
        threads.submit(lambda: None).result()  # it has had its time
        assert same(found, group_by_shard(order, begin, begin + 6))
    here = threading.current_thread().name
    assert [name for name in by if name != here] == ["planner_0"] * 3
    assert by[0] == here


def test_something_else_than_expected_and_threads_without_time(
    order: SampleOrder, threads: ThreadPoolExecutor
) -> None:
    planner = IndexPrefetcher(order, threads)
    planner.prefetch(6, 12)
    threads.submit(lambda: None).result()
    assert same(planner(30, 36), group_by_shard(order, 30, 36))
    assert same(planner(6, 12), group_by_shard(order, 6, 12))  # it is forgotten, and right
    free = threading.Event()
    busy = threads.submit(free.wait)
    planner.prefetch(6, 12)
    assert same(planner(6, 12), group_by_shard(order, 6, 12))  # does not wait for the thread
    free.set()
    busy.result()
