"""Batches: who gets what, from where on, and what is never read again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.store import Batch, BatchLoader, SampleOrder, Store
from pipeline.store.reading.batch_loader import rank_slice
from pipeline.store.reading.row_request import ShardRows
from pipeline.store.reading.stream_reader import DamagedShardError, StreamReader
from tests.helpers import SIZES, known_values, recorded_opens

STREAMS = ("latents", "maps")


@contextmanager
def loading(
    store: Store, *, streams: tuple[str, ...] = STREAMS, window: int = 2, **options: Any
) -> Iterator[BatchLoader]:
    order = SampleOrder(11, SIZES, window)
    loader = BatchLoader(store, streams, order, **{"global_batch": 5, **options})
    try:
        yield loader
    finally:
        loader.close()


def take(store: Store, count: int, **options: Any) -> list[Batch]:
    with loading(store, **options) as loader:
        return list(islice(loader, count))


def same(a: Batch, b: Batch) -> None:
    assert a.step == b.step
    assert np.array_equal(a.positions, b.positions)
    assert a.columns.keys() == b.columns.keys()
    for stream in a.columns:
        assert a.columns[stream].keys() == b.columns[stream].keys()
        for column, values in a.columns[stream].items():
            assert np.array_equal(values, b.columns[stream][column])


def joined(batches: list[Batch]) -> Batch:
    columns = {
        stream: {
            column: np.concatenate([batch.columns[stream][column] for batch in batches])
            for column in batches[0].columns[stream]
        }
        for stream in batches[0].columns
    }
    positions = np.concatenate([batch.positions for batch in batches])
    return Batch(batches[0].step, positions, columns)


def test_batches_hold_the_samples_of_the_order_in_every_stream(known_store: Store) -> None:
    order = SampleOrder(11, SIZES, 2)
    for step, batch in enumerate(take(known_store, 7)):  # almost three epochs
        positions = np.arange(5 * step, 5 * step + 5)
        assert (batch.step, batch.positions.tolist()) == (step, positions.tolist())
        shards, rows = order.locate(positions)
        for i, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            for stream, columns in known_values(shard, row).items():
                for column, value in columns.items():
                    assert np.array_equal(batch.columns[stream][column][i], value)


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 7])
def test_ranks_together_read_what_one_reads(known_store: Store, world_size: int) -> None:
    whole = take(known_store, 6)
    ranks = [take(known_store, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        same(batch, joined([batches[step] for batches in ranks]))


@pytest.mark.parametrize("global_batch", [1, 5, 8, 256])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 8])
def test_slices_cover_the_batch_and_differ_by_one_at_most(
    global_batch: int, world_size: int
) -> None:
    slices = [rank_slice(global_batch, rank, world_size) for rank in range(world_size)]
    assert [n for begin, end in slices for n in range(begin, end)] == list(range(global_batch))
    lengths = [end - begin for begin, end in slices]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("start", [1, 2, 3, 9])
def test_starting_at_a_step_is_skipping_those_before(known_store: Store, start: int) -> None:
    skipped = take(known_store, start + 4)[start:]
    for a, b in zip(skipped, take(known_store, 4, start_step=start), strict=True):
        same(a, b)


def test_prefetch_and_window_files_do_not_change_what_is_read(known_store: Store) -> None:
    for a, b in zip(take(known_store, 6), take(known_store, 6, prefetch=7), strict=True):
        same(a, b)


def test_after_close_streams_nothing_of_them_is_opened_or_delivered(known_store: Store) -> None:
    with recorded_opens() as paths, loading(known_store, window=1) as loader:
        batches = iter(loader)
        before = list(islice(batches, 4))
        assert all("maps" in batch.columns for batch in before)
        loader.close_streams(["maps"])
        opens, size = loader.opens["maps"], loader.bytes_read["maps"]
        latents = loader.opens["latents"]
        assert any("/maps/" in path for path in paths)
        paths.clear()
        after = list(islice(batches, 15))
        assert not any("/maps/" in path for path in paths)
        assert any("/latents/" in path for path in paths)
        assert (loader.opens["maps"], loader.bytes_read["maps"]) == (opens, size)
        assert loader.opens["latents"] > latents
    assert [batch.step for batch in after] == list(range(4, 19))
    assert all(batch.columns.keys() == {"latents"} for batch in after)
    alone = take(known_store, 15, start_step=4, streams=("latents",), window=1)
    for a, b in zip(after, alone, strict=True):
        same(a, b)


def test_counters_agree_with_what_the_filesystem_saw(known_store: Store) -> None:
    with recorded_opens() as paths:
        with loading(known_store, window=1) as loader:
            list(islice(loader, 9))
        for stream in STREAMS:
            opened = [path for path in paths if f"/{stream}/" in path]
            assert loader.opens[stream] == len(opened) > 0
            assert 0 < loader.bytes_read[stream] <= sum(Path(p).stat().st_size for p in opened)


@pytest.mark.parametrize("start", [0, 2])
def test_a_stream_is_not_read_for_steps_that_do_not_need_it(known_store: Store, start: int) -> None:
    """Though the thread is ahead of the consumer, nothing of step 3 or later is read."""
    options = {"window": 1, "start_step": start, "prefetch": 9}
    with recorded_opens() as paths:
        batches = take(known_store, 9, needed_until={"maps": 3}, **options)
    shards, _ = SampleOrder(11, SIZES, 1).locate(np.arange(5 * start, 15))
    opened = {Path(path).name for path in paths if "/maps/" in path}
    assert opened == {f"shard-{shard:06d}.tar" for shard in shards}
    for batch in batches:
        assert ("maps" in batch.columns) == (batch.step < 3)
        assert "latents" in batch.columns


@pytest.mark.parametrize(("start", "until"), [(0, 0), (3, 3), (8, 3)])
def test_a_stream_that_no_step_needs_is_never_opened(
    known_store: Store, start: int, until: int
) -> None:
    with recorded_opens() as paths:
        with loading(known_store, start_step=start, needed_until={"maps": until}) as loader:
            batches = list(islice(loader, 6))
        assert (loader.opens["maps"], loader.bytes_read["maps"]) == (0, 0)
        assert not any("/maps/" in path for path in paths)
    assert all(batch.columns.keys() == {"latents"} for batch in batches)


def test_a_stream_that_was_not_asked_for_is_never_opened(known_store: Store) -> None:
    with recorded_opens() as paths:
        batches = take(known_store, 6, streams=("latents",))
    assert not any("/maps/" in path for path in paths)
    assert all(batch.columns.keys() == {"latents"} for batch in batches)


def test_an_error_in_the_thread_reaches_the_consumer(known_store: Store) -> None:
    for path in Path(known_store.root, "maps").iterdir():
        path.unlink()
    with loading(known_store) as loader, pytest.raises(DamagedShardError, match="stream 'maps'"):
        next(iter(loader))


def test_batches_before_the_damage_are_delivered(known_store: Store) -> None:
    order = SampleOrder(11, SIZES, 1)
    shards, _ = order.locate(np.arange(12))
    last = int(shards[-1])
    safe = shards.tolist().index(last) // 5  # steps of epoch 0 without that shard
    Path(known_store.root, "latents", f"shard-{last:06d}.tar").unlink()
    with loading(known_store, window=1) as loader:
        batches = iter(loader)
        assert [batch.step for batch in islice(batches, safe)] == list(range(safe))
        with pytest.raises(DamagedShardError, match=f"shard {last}"):
            next(batches)


def test_the_error_a_run_stops_with_is_nobodys_luck(
    known_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many shards a task reads, and whoever is first: that of the first stream's first
    shard that has one, all shards being wanted by one batch."""
    for stream, shard in [("maps", 0), ("latents", 3), ("latents", 1)]:
        Path(known_store.root, stream, f"shard-{shard:06d}.tar").unlink()
    messages = set()
    for size in (1, 2, 4):

        def split(_: object, wanted: list[ShardRows], size: int = size) -> list[list[ShardRows]]:
            return [wanted[begin : begin + size] for begin in range(0, len(wanted), size)]

        monkeypatch.setattr(StreamReader, "split_into_tasks", split)
        for count in (1, 8):
            with (
                loading(known_store, threads=count, window=4, global_batch=sum(SIZES)) as loader,
                pytest.raises(DamagedShardError) as error,
            ):
                next(iter(loader))
            messages.add(str(error.value))
    (message,) = messages
    assert message.startswith("stream 'latents', shard 1 of")


def threads() -> int:
    return sum(thread.name.startswith("batch-loader") for thread in threading.enumerate())


@pytest.mark.parametrize("consumed", [0, 1, 5])
@pytest.mark.parametrize("prefetch", [1, 4])
def test_close_ends_the_threads(known_store: Store, consumed: int, prefetch: int) -> None:
    assert threads() == 0
    with loading(known_store, prefetch=prefetch) as loader:
        list(islice(loader, consumed))
        assert threads() > 0
    assert threads() == 0
    with recorded_opens() as paths:
        loader.close()
        time.sleep(0.02)
    assert paths == []


def test_close_ends_after_an_error(known_store: Store) -> None:
    Path(known_store.root, "commits", "shard-000000.json").write_text("{")
    with loading(Store.open(known_store.url)):
        time.sleep(0.02)
    assert threads() == 0


def test_closed_streams_are_closed_even_while_the_thread_reads(known_store: Store) -> None:
    for _ in range(10):
        with recorded_opens() as paths, loading(known_store, window=1, prefetch=3) as loader:
            loader.close_streams(["maps"])
            paths.clear()
            batches = list(islice(loader, 8))
            assert not any("/maps/" in path for path in paths)
        assert all("maps" not in batch.columns for batch in batches)


def test_batches_are_read_into_the_memory_that_is_given(known_store: Store) -> None:
    given: list[np.ndarray] = []

    def allocate(nbytes: int) -> np.ndarray:
        given.append(np.full(nbytes, 7, np.uint8))
        return given[-1]

    for a, b in zip(take(known_store, 4), take(known_store, 4, allocate=allocate), strict=True):
        same(a, b)
        for columns in b.columns.values():
            for array in columns.values():
                assert any(np.shares_memory(array, memory) for memory in given)
