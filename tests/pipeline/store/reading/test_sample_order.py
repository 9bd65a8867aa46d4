"""The endless order of samples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pipeline.store import SampleOrder
from schemas.errors import UserError

LAYOUTS = [
    [1],
    [7],
    [4, 4, 4, 2],
    [5, 3, 0, 4],
    [0, 0, 3, 0],
    [0, 5],
    [1] * 20,
    [3, 0, 0, 0, 0, 0, 7, 1, 0, 2, 9, 0],
    list(range(1, 12)),
]
WINDOWS = [1, 2, 3, 8, 100]


def epoch_of(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    positions = epoch * order.epoch_size + np.arange(order.epoch_size)
    shards, rows = order.locate(positions)
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_sample_comes_exactly_once_in_each_epoch(sizes: list[int], window: int) -> None:
    order = SampleOrder(3, sizes, window)
    everything = Counter((shard, row) for shard, size in enumerate(sizes) for row in range(size))
    assert order.epoch_size == sum(sizes)
    for epoch in (0, 1, 2, 1000):
        assert Counter(epoch_of(order, epoch)) == everything


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_location_is_a_pure_function_of_the_position(sizes: list[int], window: int) -> None:
    positions = np.arange(3 * sum(sizes) + 2)
    shards, rows = SampleOrder(5, sizes, window).locate(positions)
    used = SampleOrder(5, sizes, window)
    rng = np.random.default_rng(0)
    for _ in range(12):
        chosen = rng.choice(positions, size=rng.integers(1, len(positions) + 1))
        found = used.locate(chosen)
        assert np.array_equal(found[0], shards[chosen])
        assert np.array_equal(found[1], rows[chosen])


def test_batches_that_straddle_epochs_are_whole() -> None:
    order = SampleOrder(0, [5, 3, 0, 4], 2)  # 12 samples, batches of 7
    flat = epoch_of(order, 0) + epoch_of(order, 1) + epoch_of(order, 2)
    for step in range(5):
        shards, rows = order.locate(step * 7 + np.arange(7))
        expected = flat[step * 7 : step * 7 + 7]
        assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == expected


def test_one_batch_may_hold_several_epochs() -> None:
    order = SampleOrder(0, [2, 1], 1)
    shards, rows = order.locate(np.arange(9))
    found = list(zip(shards.tolist(), rows.tolist(), strict=True))
    assert found == epoch_of(order, 0) + epoch_of(order, 1) + epoch_of(order, 2)


def test_epochs_and_seeds_differ() -> None:
    sizes = [8] * 8
    epochs = [tuple(epoch_of(SampleOrder(0, sizes, 2), epoch)) for epoch in range(5)]
    seeds = [tuple(epoch_of(SampleOrder(seed, sizes, 2), 0)) for seed in range(1, 5)]
    assert len({*epochs, *seeds}) == 9


def test_shards_and_rows_are_shuffled_inside_the_window() -> None:
    order = epoch_of(SampleOrder(0, [50] * 8, 4), 0)
    assert [shard for shard, _ in order] != sorted(shard for shard, _ in order)
    first = order[:200]
    assert len({shard for shard, _ in first}) == 4
    assert len({shard for shard, _ in first[:30]}) > 2  # not one shard after the other
    rows = [row for shard, row in first if shard == first[0][0]]
    assert rows != sorted(rows)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_no_more_shards_than_the_window_are_in_use_at_a_time(sizes: list[int], window: int) -> None:
    shards = [shard for shard, _ in epoch_of(SampleOrder(1, sizes, window), 0)]
    first = {shard: shards.index(shard) for shard in shards}
    last = {shard: place for place, shard in enumerate(shards)}
    for place in range(len(shards)):
        in_use = [shard for shard in first if first[shard] <= place <= last[shard]]
        assert len(in_use) <= window


def test_window_1_takes_shard_after_shard() -> None:
    shards = [shard for shard, _ in epoch_of(SampleOrder(0, [3] * 6, 1), 0)]
    assert [shards[i] for i in range(0, 18, 3)] == [shards[i] for i in range(2, 18, 3)]


def test_order_never_changes_between_versions() -> None:
    """A run is resumed by later versions: recorded from the first version."""
    recorded = [(0, 2), (2, 1), (0, 1), (2, 0), (0, 0), (1, 0), (1, 1)]
    assert epoch_of(SampleOrder(7, [3, 2, 2], 2), 1) == recorded


@pytest.mark.parametrize("window", [1, 3, 100])
def test_shards_are_left_out_from_the_epoch_after_the_one_they_were_found_in(window: int) -> None:
    sizes = [5, 3, 0, 4, 6, 2]
    plain = SampleOrder(0, sizes, window)
    order = SampleOrder(0, sizes, window, {1: 2, 4: 0})
    now = SampleOrder(0, sizes, window)
    now.leave_out({4: 0})
    now.locate(np.arange(200))
    now.leave_out({1: 2})
    flat = []
    for epoch in range(6):
        start, end = order.epoch_span(epoch)
        assert start == len(flat)
        assert (order.epoch_of(start), order.epoch_of(end - 1)) == (epoch, epoch)
        shards, rows = order.locate(np.arange(start, end))
        found = list(zip(shards.tolist(), rows.tolist(), strict=True))
        gone = {shard for shard, at in {1: 2, 4: 0}.items() if epoch > at}
        kept = [(s, r) for s, size in enumerate(sizes) for r in range(size) if s not in gone]
        assert sorted(found) == kept
        if epoch == 0:
            assert found == epoch_of(plain, 0)
        flat += found
    shards, rows = order.locate(np.arange(len(flat)))
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == flat
    for a, b in zip(now.locate(np.arange(len(flat))), (shards, rows), strict=True):
        assert np.array_equal(a, b)


def test_leaving_out_everything_is_refused() -> None:
    with pytest.raises(UserError, match="every shard"):
        SampleOrder(0, [2, 0, 3], 2, {0: 0, 2: 5})
    with pytest.raises(ValueError, match="no shard 3"):
        SampleOrder(0, [2, 0, 3], 2, {3: 0})


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_a_window_s_end_is_where_its_shards_are_done(sizes: list[int], window: int) -> None:
    order = SampleOrder(2, sizes, window)
    shards, _, ends = order.locate_windows(np.arange(order.epoch_size))
    for shard in np.unique(shards):
        places = np.flatnonzero(shards == shard)
        assert (ends[places] == ends[places[0]]).all()
        assert ends[places[0]] > places[-1]
    assert ends[-1] == order.epoch_size
    assert len(np.unique(ends)) <= -(-len(sizes) // window)


def test_a_store_without_samples_has_no_order() -> None:
    for sizes in ([], [0], [0, 0]):
        with pytest.raises(ValueError, match="no samples"):
            SampleOrder(0, sizes)


def test_held_out_rows_are_in_no_epoch_and_the_rest_is_shuffled_as_a_smaller_store() -> None:
    sizes, held_out = [5, 3, 4, 2], {0: np.array([1, 4]), 2: np.array([0, 1, 2, 3])}
    order = SampleOrder(3, sizes, 2, held_out=held_out)
    assert order.epoch_size == 8
    smaller = SampleOrder(3, [3, 3, 0, 2], 2)
    kept = {0: [0, 2, 3], 1: [0, 1, 2], 3: [0, 1]}
    positions = np.arange(40)
    shards, rows = order.locate(positions)
    own_shards, own_rows = smaller.locate(positions)
    assert shards.tolist() == own_shards.tolist()
    assert rows.tolist() == [kept[s][r] for s, r in zip(own_shards, own_rows, strict=True)]
