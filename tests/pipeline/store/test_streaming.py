"""Threads, caches and bad storage change nothing but time; closed streams are closed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.storage import retry
from pipeline.store import Batch, BatchLoader, SampleOrder, Store
from pipeline.store.errors import DamagedShardError
from pipeline.store.reading.batch_loader import IndexPrefetcher
from pipeline.store.reading.file_source import whole_if_cheaper
from tests.helpers import write_known_store

SIZES = (9, 5, 0, 8, 7, 9, 1, 9, 6, 9)
BATCH = 7
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def remote() -> Iterator[Store]:
    yield write_known_store("memory://streaming/store", SIZES)
    MemoryFileSystem.store.clear()


def open_loader(store: Store, **options: Any) -> BatchLoader:
    order = SampleOrder(3, SIZES, options.pop("window", 3))
    return BatchLoader(
        store, ("latents", "maps"), order, **{"global_batch": BATCH, "threads": 4, **options}
    )


def take(store: Store, count: int, **options: Any) -> list[Batch]:
    loader = open_loader(store, **options)
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def values_of(batches: list[Batch]) -> dict[tuple[str, str], np.ndarray]:
    """All columns of all batches, one behind the other."""
    return {
        (stream, name): np.concatenate([batch.columns[stream][name] for batch in batches])
        for stream, columns in batches[0].columns.items()
        for name in columns
    }


def same(a: list[Batch], b: list[Batch]) -> None:
    one, other = values_of(a), values_of(b)
    assert one.keys() == other.keys()
    for key, values in one.items():
        assert np.array_equal(values, other[key]), key


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 64])
@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1, "prefetch": 1, "memory": 0},
        {"threads": 8, "prefetch": 9},
        {"threads": 3, "prefetch": 2, "memory": 70_000},
        {"threads": 16, "prefetch": 4, "verify": False},
    ],
    ids=str,
)
def test_no_setting_and_no_number_of_ranks_changes_a_batch(
    remote: Store, world_size: int, options: dict[str, Any]
) -> None:
    whole = take(remote, 20)  # more than two epochs
    ranks = [
        take(remote, 20, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        same([batch], [batches[step] for batches in ranks])
    for batch in whole:
        for columns in batch.columns.values():
            assert all(array.flags.c_contiguous for array in columns.values())


@pytest.fixture
def bad_weather(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every read takes some milliseconds; the first of each file fails, and one in three later.
    The paths that did."""
    rng, failed = random.Random(0), list[str]()
    read = MemoryFileSystem.cat_file

    def slow(self: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> bytes:
        time.sleep(rng.random() * 0.003)
        if path not in failed or rng.random() < 1 / 3:
            failed.append(path)
            raise ConnectionResetError(path)
        return bytes(read(self, path, *args, **kwargs))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", slow)
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.001)
    return failed


@pytest.mark.parametrize("memory", [0, PLENTY])
def test_slow_and_failing_storage_changes_nothing(
    remote: Store, memory: int, request: pytest.FixtureRequest
) -> None:
    expected = take(remote, 20)
    failed = request.getfixturevalue("bad_weather")
    same(take(Store.open(remote.url), 20, memory=memory, prefetch=3), expected)
    assert {path.rpartition(".")[2] for path in failed} >= {"tar", "json"}


@pytest.mark.parametrize("memory", [0, 1, 70_000, 200_000, PLENTY])
def test_whole_files_stay_within_their_bytes(remote: Store, memory: int) -> None:
    loader = open_loader(remote, memory=memory, prefetch=4)
    held = []
    for _ in islice(loader, 40):
        held.append(loader.budget.used)
    assert max(held) <= loader.budget.peak <= memory
    loader.close()
    assert loader.budget.used == 0
    if memory == PLENTY:  # those of two windows at most: what has passed is let go
        largest = max(
            sum(files[0].bytes for files in remote.record(shard).streams.values())
            for shard in range(len(SIZES))
        )
        assert loader.budget.peak <= largest * 3 * 3


def test_each_file_is_read_once_per_window_where_memory_holds_it(remote: Store) -> None:
    steps = sum(SIZES) * 2 // BATCH  # two epochs
    loader = open_loader(remote, prefetch=1)
    list(islice(loader, steps))
    loader.close()
    for stream in ("latents", "maps"):
        once = sum(remote.record(s).streams[stream][0].bytes for s in range(len(SIZES)) if SIZES[s])
        assert loader.bytes_read[stream] <= 2 * once
        assert loader.opens[stream] <= 2 * sum(map(bool, SIZES))


@pytest.mark.parametrize(
    ("sample_bytes", "world_size", "whole"),
    [
        (200_000, 1, True),
        (200_000, 2, True),
        (200_000, 8, False),
        (16_500, 8, True),
        (16_500, 64, False),
        (3_900_000, 1, True),
        (3_900_000, 4, False),
    ],
)
def test_a_file_is_read_whole_where_that_costs_less(
    sample_bytes: int, world_size: int, whole: bool
) -> None:
    assert whole_if_cheaper(world_size)(64 * sample_bytes, 64) == whole


class Gate:
    """Reads of paths with ``part`` in them stop until opened; tells what is read."""

    def __init__(self, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.read: list[str] = []
        read = MemoryFileSystem.cat_file

        def cat(filesystem: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> bytes:
            if part in path:
                self.reached.set()
                assert self.opened.wait(20)
            data = bytes(read(filesystem, path, *args, **kwargs))
            self.read.append(path)
            return data

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat)


@pytest.mark.parametrize("memory", [0, PLENTY])
def test_close_streams_waits_for_reads_in_flight_and_none_follows(
    remote: Store, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    gate = Gate("/maps/", monkeypatch)
    loader = open_loader(Store.open(remote.url), memory=memory, prefetch=6)
    assert gate.reached.wait(20)
    closing = threading.Thread(target=loader.close_streams, args=(["maps"],))
    closing.start()
    time.sleep(0.05)
    assert closing.is_alive()  # a read of the stream is under way
    gate.opened.set()
    closing.join(20)
    assert not closing.is_alive()
    count = sum("/maps/" in path for path in gate.read)
    assert count <= 4 * 8  # what four threads were at, however many batches were asked for
    opens = loader.opens["maps"]
    batches = list(islice(loader, 20))
    loader.close()
    assert sum("/maps/" in path for path in gate.read) == count
    assert loader.opens["maps"] == opens
    assert all(batch.columns.keys() == {"latents"} for batch in batches)
    with pytest.raises(CancelledError):
        loader._readers["maps"].read(np.array([0]), np.array([0]))


@pytest.mark.parametrize("away", ["/maps/", ".json"])
@pytest.mark.parametrize("memory", [0, PLENTY])
def test_closing_does_not_wait_for_storage_to_come_back(
    remote: Store, monkeypatch: pytest.MonkeyPatch, memory: int, away: str
) -> None:
    read, failed = MemoryFileSystem.cat_file, threading.Event()

    def cat(self: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> bytes:
        if away in path:
            failed.set()
            raise ConnectionResetError(path)
        return bytes(read(self, path, *args, **kwargs))

    store = Store.open(remote.url)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat)
    monkeypatch.setattr(retry, "FIRST_DELAY", 60.0)
    monkeypatch.setattr(retry, "MAX_DELAY", 60.0)
    loader = open_loader(store, memory=memory, prefetch=6)
    assert failed.wait(20)
    begin = time.monotonic()
    if away == "/maps/":
        loader.close_streams(["maps"])
        assert all(batch.columns.keys() == {"latents"} for batch in islice(loader, 20))
    loader.close()
    assert time.monotonic() - begin < 20


def test_a_stream_does_not_wait_for_another(remote: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate("/maps/", monkeypatch)
    loader = open_loader(Store.open(remote.url), threads=16, prefetch=1)
    assert gate.reached.wait(20)
    deadline = time.monotonic() + 20
    while not any("/latents/" in path for path in gate.read):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    gate.opened.set()
    loader.close()


def damage(store: Store, stream: str, shard: int, change: Callable[[bytearray], object]) -> None:
    path = Path(store.root) / store.record(shard).streams[stream][0].file
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def test_the_first_error_of_a_step_is_the_same_whoever_is_first(tmp_path: Path) -> None:
    store = write_known_store(str(tmp_path), SIZES)
    shards, _ = SampleOrder(3, SIZES, 3).locate(np.arange(sum(SIZES)))
    for stream in ("maps", "latents"):
        for shard in shards[20:40].tolist():
            damage(store, stream, shard, lambda data: data.__setitem__(slice(512, None), b""))
    messages = set()
    for threads in (1, 2, 8, 8, 8):
        loader = open_loader(store, window=1, threads=threads, prefetch=5)
        steps: list[int] = []
        with pytest.raises(DamagedShardError) as error:
            steps.extend(batch.step for batch in loader)
        with pytest.raises(DamagedShardError, match=r"^stream"):
            next(iter(loader))  # it goes on saying so
        loader.close()
        messages.add((str(error.value), len(steps)))
    assert len(messages) == 1


def test_a_late_start_is_no_more_work(remote: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions and what is made for them, counted: nothing depends on the position."""
    work = []
    # of the batch after the last, a thread makes what it gets to
    monkeypatch.setattr(IndexPrefetcher, "prefetch", lambda *_: None)
    for attribute in ("_make_epoch", "_make_window"):
        made = getattr(SampleOrder, attribute)

        def count(self: SampleOrder, *at: int, made: Any = made, name: str = attribute) -> Any:
            work.append(name)
            return made(self, *at)

        monkeypatch.setattr(SampleOrder, attribute, count)

    def cost(start: int) -> tuple[int, int, int]:
        work.clear()
        loader = open_loader(Store.open(remote.url), start_step=start, prefetch=1, memory=0)
        next(iter(loader))
        loader.close()
        return work.count("_make_epoch"), work.count("_make_window"), sum(loader.opens.values())

    assert sum(SIZES) % BATCH == 0
    whole_epochs = (300_000_000 // BATCH) // (sum(SIZES) // BATCH) * (sum(SIZES) // BATCH)
    at_zero, late = cost(0), cost(whole_epochs)
    assert late[:2] == at_zero[:2] == (1, at_zero[1])
    assert abs(late[2] - at_zero[2]) <= 8  # of the two batches that are under way
