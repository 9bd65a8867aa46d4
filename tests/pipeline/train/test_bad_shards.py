"""Runs on a store with a damaged shard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoints.local import latest_checkpoint
from pipeline.checkpoints.state import read_state
from pipeline.runs.directory import METRICS
from pipeline.runs.metrics import read_metrics
from pipeline.store import Store
from pipeline.store.errors import DamagedShardError
from schemas.run import RunConfig
from tests.pipeline.train.test_loop import losses, run, weights
from tests.processes import train_on
from tests.stores import make_random_store

Make = Callable[..., RunConfig]


@pytest.fixture
def bad_store(tmp_path: Path) -> Store:
    store = make_random_store(tmp_path / "bad-store")  # 22 samples, 6 in a shard
    Path(store.root, store.record(2).streams["latents"][0].file).unlink()
    return store


def test_a_run_continues_without_bad_shards_and_a_resumed_one_is_bit_identical(
    run_config: Make, bad_store: Store, tmp_path: Path
) -> None:
    options = {"store": bad_store.url, "steps": 12, "data": {"on_bad_shard": "quarantine"}}
    run(run_config(**options), tmp_path / "whole")
    for steps in (3, 5, 9, 12):
        run(
            run_config(**{**options, "steps": steps}),
            tmp_path / "pieces",
            latest_checkpoint(tmp_path / "pieces"),
        )
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "pieces")
    assert all(one[name].equal(other[name]) for name in one)
    newest = latest_checkpoint(tmp_path / "whole")
    assert newest is not None
    assert read_state(newest).data == {"damaged": {"2": 0}}


def test_without_quarantine_it_stops_and_names_the_shard(
    run_config: Make, bad_store: Store, tmp_path: Path
) -> None:
    with pytest.raises(DamagedShardError, match=r"stream 'latents', shard 2 of .* is missing"):
        run(run_config(store=bad_store.url, steps=12), tmp_path / "run")


def test_workers_agree_on_the_shards_to_leave_out(
    run_config: Make, bad_store: Store, tmp_path: Path
) -> None:
    options = {"store": bad_store.url, "steps": 12, "data": {"on_bad_shard": "quarantine"}}
    folder = tmp_path / "changing"
    run(run_config(**options), tmp_path / "alone")
    train_on(3, run_config(**{**options, "steps": 4}), folder)
    train_on(2, run_config(**options), folder)
    newest = latest_checkpoint(folder)
    assert newest is not None
    assert read_state(newest).data == {"damaged": {"2": 0}}
    for row, expected in zip(losses(folder), losses(tmp_path / "alone"), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


def test_a_measurement_continues_without_bad_shards(
    run_config: Make, bad_store: Store, tmp_path: Path
) -> None:
    """The probe reads its own samples, from shards that the loader may not have read yet."""
    termination = {"kind": "gradient_cosine", "start": 1, "every": 1, "samples": 22, "threshold": 1}
    options = {
        "store": bad_store.url,
        "steps": 3,
        "alignment": {"termination": termination},
        "data": {"on_bad_shard": "quarantine"},
    }
    run(run_config(**options), tmp_path / "alone")
    train_on(2, run_config(**options), tmp_path / "two")
    (seen,) = [row for row in read_metrics(tmp_path / "alone" / METRICS) if "event" in row]
    (other,) = [row for row in read_metrics(tmp_path / "two" / METRICS) if "event" in row]
    assert seen["gradient_cosine"] == pytest.approx(other["gradient_cosine"], rel=1e-3)
