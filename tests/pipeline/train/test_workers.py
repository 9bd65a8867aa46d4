"""The result depends on the global batch only: not on workers, micro-batches or their changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pipeline.runs.metrics import read_metrics
from pipeline.store import Batch, BatchLoader, SampleOrder, Store
from pipeline.store.reading.batch_loader import rank_slice
from pipeline.train.inputs import split_batch
from pipeline.train.noise import draw
from schemas.run import RunConfig
from tests.processes import train_on

Make = Callable[..., RunConfig]
LOSSES = ("denoising", "feature", "attention", "grad_norm")
EPS = {"eps": 1e-3}
"""Large enough that Adam does not turn rounding noise into full steps where the exact gradient is
0: a key's bias changes all logits of a row equally."""


def rows_of(folder: Path) -> list[list[float]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [[row[n] for n in LOSSES if n in row] for row in rows if "event" not in row]


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.stem}.{name}": tensor
        for path in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_up_to_summation_order(one: Path, other: Path, step: int = 6) -> None:
    for expected, got in zip(rows_of(one), rows_of(other), strict=True):
        assert got == pytest.approx(expected, rel=2e-5)
    name = f"checkpoint-{step:09d}"
    expected_weights, got_weights = weights_of(one / name), weights_of(other / name)
    assert expected_weights.keys() == got_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(got_weights[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("world_size", [1, 2, 3, 64])
@pytest.mark.parametrize("global_batch", [64, 100, 256])
def test_slices_are_the_global_batch(world_size: int, global_batch: int) -> None:
    slices = [rank_slice(global_batch, rank, world_size) for rank in range(world_size)]
    assert [number for begin, end in slices for number in range(begin, end)] == list(
        range(global_batch)
    )
    sizes = [end - begin for begin, end in slices]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_samples_and_draws_of_a_step_do_not_depend_on_the_workers(
    random_store: Store, world_size: int
) -> None:
    def batches(rank: int, world: int) -> list[Batch]:
        order = SampleOrder(7, random_store.index().samples_per_shard, window=2)
        loader = BatchLoader(
            random_store, ["latents"], order, global_batch=5, rank=rank, world_size=world
        )
        found = [batch for batch, _ in zip(loader, range(9), strict=False)]  # two epochs
        loader.close()
        return found

    whole = batches(0, 1)
    shares = [batches(rank, world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        positions = np.concatenate([part.positions for part in parts])
        assert np.array_equal(positions, batch.positions)
        for column, values in batch.columns["latents"].items():
            joined = np.concatenate([part.columns["latents"][column] for part in parts])
            assert np.array_equal(joined, values)
        drawn = [draw(7, part.positions, (4, 8, 8), 0.1, class_token=6) for part in (*parts, batch)]
        for *got, expected in zip(*drawn, strict=True):
            assert torch.equal(torch.cat(got), expected)


def test_more_workers_than_samples_are_refused(run_config: Make) -> None:
    with pytest.raises(ValidationError, match="global_batch 5 leaves some of 6 workers without"):
        run_config(workers={"count": 6})


def test_fewer_workers_than_none_or_more_than_all_are_refused(run_config: Make) -> None:
    with pytest.raises(ValidationError, match="min_count 3 is more than count 2"):
        run_config(workers={"count": 2, "min_count": 3})


def test_micro_batches_are_the_slice(random_store: Store) -> None:
    columns = {"latents": {"label": np.arange(5) * 10}}
    batch = Batch(3, np.arange(5), columns)
    draws = draw(7, batch.positions, (2, 2, 2), 0.5)
    for size in (None, 5, 9):
        (whole, all_draws), *more = split_batch(batch, draws, size)
        assert not more
        assert whole.positions.tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(all_draws.noise, draws.noise)
    parts, drawn = zip(*split_batch(batch, draws, 2), strict=True)
    assert torch.equal(torch.cat([part.t for part in drawn]), draws.t)
    assert torch.equal(torch.cat([part.noise for part in drawn]), draws.noise)
    assert [part.positions.tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part.columns["latents"]["label"].tolist() for part in parts] == [
        [0, 10],
        [20, 30],
        [40],
    ]
    assert {part.step for part in parts} == {3}


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    run_config: Make, tmp_path: Path, micro_batch: int
) -> None:
    """Steps before, at and after the termination."""
    for name, size in (("whole", None), ("parts", micro_batch)):
        train_on(1, run_config(workers={"micro_batch": size}, optimizer=EPS), tmp_path / name)
    assert_same_up_to_summation_order(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("world_size", "micro_batch"), [(3, None), (2, 2)])
def test_many_processes_train_what_one_trains(
    run_config: Make, tmp_path: Path, world_size: int, micro_batch: int | None
) -> None:
    """Slices of 1, 2 and 2 samples; and of 2 and 3 samples in 1 and 2 micro-batches."""
    train_on(1, run_config(optimizer=EPS), tmp_path / "one")
    workers = {"count": world_size, "micro_batch": micro_batch}
    config = run_config(workers=workers, optimizer=EPS)
    train_on(world_size, config, tmp_path / "many")
    assert_same_up_to_summation_order(tmp_path / "one", tmp_path / "many")


PLATEAU = {
    "kind": "residual_plateau",
    "start": 2,
    "every": 2,
    "fast": 0.5,
    "slow": 0.9,
    "tolerance": 1e-9,
}
"""Observes all losses and never fires."""


def test_a_change_of_workers_in_mid_row(run_config: Make, tmp_path: Path) -> None:
    """Two workers stop between rows of the metrics after 3 steps, because one was asked to. Two
    resume bit-identically, one or three up to summation order."""
    config = run_config(
        optimizer=EPS,
        workers={"count": 3},
        log_every=5,
        steps=7,
        alignment={"termination": PLATEAU},
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_on(2, config, whole)
    train_on(2, config, parts, stop_at=2)
    assert [path.name for path in parts.glob("checkpoint-*")] == ["checkpoint-000000003"]
    for world_size in (1, 2, 3):
        folder = shutil.copytree(parts, tmp_path / f"on{world_size}")
        train_on(world_size, config, folder)
        if world_size != 2:
            assert_same_up_to_summation_order(whole, folder, step=7)
            continue
        name = "checkpoint-000000007"
        expected, got = weights_of(whole / name), weights_of(folder / name)
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
        assert numbers_of(folder) == numbers_of(whole)


def numbers_of(folder: Path) -> list[dict[str, object]]:
    """All rows and events without values that depend on timing or storage."""
    left_out = ("per_second", "per_worker", "data_wait", "bytes_")
    return [
        {name: value for name, value in row.items() if not any(word in name for word in left_out)}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
