"""Bad shards that are left out: which samples a step then has, on any rank and after a resume."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.storage.files import RETRY_VARIABLE, StorageError
from pipeline.store import Batch, BatchLoader, SampleOrder, Store
from pipeline.store.errors import DamagedShardError
from pipeline.store.layout import commit_path
from pipeline.store.reading.quarantine import max_bad_shards
from schemas.errors import UserError
from tests.helpers import known_values, recorded_opens, write_known_store

SIZES = (9, 5, 0, 8, 7, 9, 1, 9, 6, 9)
TOTAL = sum(SIZES)
BATCH = 8
STEPS = 4 * TOTAL // BATCH  # four epochs; they end inside batches
STREAMS = ("latents", "maps")


@pytest.fixture
def hurt(tmp_path: Path) -> Store:
    """Shard 3 has one bad sample in 'maps', shard 5 has no file of 'latents', of 7's 'maps' half
    is missing."""
    store = write_known_store(str(tmp_path / "store"), SIZES)
    file = store.record(3).streams["maps"][0]
    path = Path(store.root, file.file)
    data = bytearray(path.read_bytes())
    data[file.offsets["features"][2] + 200] ^= 1
    path.write_bytes(data)
    Path(store.root, store.record(5).streams["latents"][0].file).unlink()
    path = Path(store.root, store.record(7).streams["maps"][0].file)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return store


def labels(batch: Batch) -> list[int]:
    return batch.columns["latents"]["label"].tolist()


def check(batch: Batch) -> None:
    """Every stream holds the sample that the label names."""
    for place, label in enumerate(labels(batch)):
        for stream, columns in known_values(label // 100, label % 100).items():
            for name, value in columns.items():
                if stream in batch.columns:
                    assert np.array_equal(batch.columns[stream][name][place], value)


def run(
    store: Store,
    steps: int,
    *,
    start: int = 0,
    damaged: dict[int, int] | None = None,
    close_at: int | None = None,
    **options: Any,
) -> tuple[list[Batch], dict[str, Any]]:
    order = SampleOrder(3, SIZES, options.pop("window", 3), damaged)
    options = {"global_batch": BATCH, "on_bad_shard": "quarantine", "threads": 4, **options}
    loader = BatchLoader(store, STREAMS, order, start_step=start, **options)
    batches = []
    try:
        for batch in islice(loader, steps):
            batches.append(batch)
            if batch.step + 1 == close_at:
                loader.close_streams(["maps"])
        return batches, loader.state()
    finally:
        loader.close()


def resumed(state: dict[str, Any]) -> dict[int, int]:
    return {int(shard): epoch for shard, epoch in state["damaged"].items()}


@pytest.mark.parametrize("window", [1, 3, 100])
def test_what_cannot_be_read_is_replaced_and_its_shard_left_out(
    hurt: Store, capsys: pytest.CaptureFixture[str], window: int
) -> None:
    batches, state = run(hurt, STEPS, window=window)
    assert state == {"damaged": {"3": 0, "5": 0, "7": 0}}
    for batch in batches:
        check(batch)
    flat = [label for batch in batches for label in labels(batch)]
    first, left = flat[:TOTAL], TOTAL - SIZES[3] - SIZES[5] - SIZES[7]
    plain = SampleOrder(3, SIZES, window).locate(np.arange(TOTAL))
    readable = [100 * s + r for s, r in zip(*(x.tolist() for x in plain), strict=True)]
    for place, label in enumerate(readable):  # of the epoch in which they were found
        bad = label == 302 or label // 100 == 5 or (label // 100 == 7 and label not in first)
        assert bad or first[place] == label
    assert 302 not in flat
    assert {300, 301, 303} <= set(first)
    for begin in range(TOTAL, len(flat) - left, left):  # of all later epochs
        counts = Counter(flat[begin : begin + left])
        assert len(counts) == left
        assert not {label // 100 for label in counts} & {3, 5, 7}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert any("'maps', shard 3" in line and "class/3-2" in line for line in said)
    assert all(line.endswith("left out from epoch 1 on") for line in said)


@pytest.mark.parametrize(
    "options",
    [{"prefetch": 1, "threads": 1}, {"prefetch": 9}, {"memory": 0}, {"memory": 70_000}],
    ids=str,
)
def test_reading_ahead_changes_nothing(hurt: Store, options: dict[str, Any]) -> None:
    expected, state = run(hurt, STEPS)
    found, same_state = run(hurt, STEPS, **options)
    assert [labels(batch) for batch in found] == [labels(batch) for batch in expected]
    assert state == same_state


class Ranks:
    """``agree`` for threads that stand for ranks."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=30)
        self._union: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, mine: set[int]) -> set[int]:
        with self._lock:
            self._union = self._union | mine
        self._barrier.wait()
        union = set(self._union)
        if self._barrier.wait() == 0:
            self._union = set()
        self._barrier.wait()
        return union


def together(count: int, work: Callable[[int, Ranks], Any]) -> list[Any]:
    agree = Ranks(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: work(rank, agree), range(count)))


@pytest.mark.parametrize("world_size", [2, 3, 5, 11])
def test_ranks_together_read_what_one_reads(hurt: Store, world_size: int) -> None:
    expected, state = run(hurt, STEPS)
    results = together(
        world_size,
        lambda rank, agree: run(hurt, STEPS, rank=rank, world_size=world_size, agree=agree),
    )
    assert all(found == state for _, found in results)
    for step, batch in enumerate(expected):
        found = [label for batches, _ in results for label in labels(batches[step])]
        assert found == labels(batch)


@pytest.mark.parametrize("stop", [1, 3, 5, 6, 7, 8, 9, 13, 14, 20])
def test_a_resumed_run_goes_on_with_the_same_samples(hurt: Store, stop: int) -> None:
    expected, end = run(hurt, STEPS)
    before = together(3, lambda rank, agree: run(hurt, stop, rank=rank, world_size=3, agree=agree))
    states = [state for _, state in before]
    assert states[0] == states[1] == states[2]
    after, state = run(hurt, STEPS - stop, start=stop, damaged=resumed(states[0]))
    assert state == end
    assert [labels(b) for b in after] == [labels(b) for b in expected[stop:]]


@pytest.mark.parametrize("prefetch", [1, 6])
@pytest.mark.parametrize("close_at", [1, 3, 7])
def test_damage_that_only_read_ahead_steps_met_in_a_closed_stream_does_not_count(
    hurt: Store, close_at: int, prefetch: int
) -> None:
    batches, state = run(hurt, STEPS, close_at=close_at, prefetch=prefetch)
    known, same_state = run(hurt, STEPS, needed_until={"maps": close_at})
    assert [labels(batch) for batch in batches] == [labels(batch) for batch in known]
    assert state == same_state
    for batch in batches:
        check(batch)


def test_quarantined_shards_stay_left_out_where_bad_ones_stop_the_run(hurt: Store) -> None:
    expected, state = run(hurt, STEPS)
    first = TOTAL // BATCH + 1
    after, same_state = run(
        hurt, STEPS - first, start=first, damaged=resumed(state), on_bad_shard="stop"
    )
    assert [labels(b) for b in after] == [labels(b) for b in expected[first:]]
    assert same_state == state


def test_a_store_that_is_bad_throughout_ends_the_run(hurt: Store) -> None:
    for path in Path(hurt.root, "maps").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="cannot be read: that is more than a few bad shards"):
        run(hurt, 1)


@pytest.mark.parametrize("threads", [1, 8])
def test_a_large_bad_shard_is_asked_for_a_few_times_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """However many samples in a row are lost with it."""
    monkeypatch.setattr("pipeline.store.reading.quarantine.CANDIDATES_AT_ONCE", 4)
    sizes = (3, 40, 3, 3)
    store = write_known_store(str(tmp_path / "store"), sizes)
    lost = store.record(1).streams["maps"][0].file
    Path(store.root, lost).unlink()
    order = SampleOrder(3, sizes, 1)
    with recorded_opens() as opens:
        loader = BatchLoader(
            store, STREAMS, order, global_batch=7, on_bad_shard="quarantine", threads=threads
        )
        batches = list(islice(loader, 14))
        loader.close()
    for batch in batches:
        check(batch)
    assert not any(label // 100 == 1 for batch in batches for label in labels(batch))
    assert loader.state() == {"damaged": {"1": 0}}
    assert sum(path.endswith(lost) for path in opens) <= 7 + 1  # once per batch, and to replace it


def lose(store: Store, shards: Iterable[int]) -> None:
    for shard in shards:
        Path(store.root, store.record(shard).streams["maps"][0].file).unlink()


def test_more_than_a_few_bad_shards_end_the_run(tmp_path: Path) -> None:
    store = write_known_store(str(tmp_path / "store"), SIZES)
    assert max_bad_shards(9) == 4
    assert [max_bad_shards(count) for count in (1, 2, 20, 100, 1000)] == [0, 1, 10, 10, 100]
    lose(store, (0, 1, 3, 4))
    run(store, STEPS)
    lose(store, [5])
    complaint = "5 of the store's 9 shards cannot be read.*pipeline.inspect STORE --verify"
    with pytest.raises(UserError, match=complaint):
        run(store, STEPS)

    def work(rank: int, agree: Ranks) -> None:
        with pytest.raises(UserError, match=complaint):
            run(store, STEPS, rank=rank, world_size=3, agree=agree)

    together(3, work)


def test_bad_shards_add_up_over_epochs(tmp_path: Path) -> None:
    store = write_known_store(str(tmp_path / "store"), SIZES)
    lose(store, [5])
    with pytest.raises(UserError, match="5 of the store's 9 shards cannot be read"):
        run(store, STEPS, start=TOTAL // BATCH + 1, damaged={0: 0, 1: 0, 3: 0, 4: 0})
    with pytest.raises(UserError, match="5 of the store's 9 shards cannot be read"):
        run(store, 1, damaged=dict.fromkeys((0, 1, 3, 4, 5), 0))


@pytest.mark.parametrize("on_bad_shard", ["stop", "quarantine"])
def test_a_shard_that_was_never_committed_is_no_damage(tmp_path: Path, on_bad_shard: str) -> None:
    store = write_known_store(str(tmp_path / "store"), SIZES)
    Path(store.root, commit_path(4)).unlink()
    with pytest.raises(UserError, match="never committed") as error:
        run(Store.open(store.url), STEPS, on_bad_shard=on_bad_shard)
    assert not isinstance(error.value, DamagedShardError)


def test_storage_that_is_away_is_no_damage(hurt: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("away")

    monkeypatch.setattr(LocalFileSystem, "cat_file", away)
    monkeypatch.setattr("os.preadv", away)
    monkeypatch.setenv(RETRY_VARIABLE, "0")
    with pytest.raises(StorageError):
        run(hurt, 1)
