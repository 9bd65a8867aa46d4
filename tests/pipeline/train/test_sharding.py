"""Sharded weights (FSDP2) train what replicated ones do, into the same checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from pydantic import ValidationError

from pipeline.checkpoints.state import load_optimizer
from schemas.run import ComputeConfig, RunConfig
from tests.pipeline.train.test_workers import (
    EPS,
    assert_same_up_to_summation_order,
    numbers_of,
    rows_of,
    weights_of,
)
from tests.processes import divides, train_on

Make = Callable[..., RunConfig]
SHARD = {"shard": "fsdp2"}


def moments_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = load_optimizer(checkpoint)["state"]
    return {f"{n}.{key}": value for n, one in state.items() for key, value in one.items()}


def assert_same_run(one: Path, other: Path, step: int = 6) -> None:
    assert_same_up_to_summation_order(one, other, step)
    name = f"checkpoint-{step:09d}"
    expected, got = moments_of(one / name), moments_of(other / name)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-7, msg=key)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"on_nan": "skip_step"}},
        pytest.param({"compute": {"optimizer": "plain"}}, marks=pytest.mark.slow),
    ],
    ids=["fused", "skip_step", "plain optimizer"],
)
def test_shards_train_what_copies_train(
    run_config: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Before, at and after the termination, in micro-batches, with 2 and 3 samples a worker."""
    workers = {"count": 2, "micro_batch": 3}
    compute = changes.pop("compute", {})
    for name, shard in (("copies", {}), ("shards", SHARD)):
        chosen = {**compute, **shard, "compile": "off"}
        config = run_config(workers=workers, optimizer=EPS, compute=chosen, **changes)
        train_on(2, config, tmp_path / name)
    assert len(rows_of(tmp_path / "copies")) == 6
    assert_same_run(tmp_path / "copies", tmp_path / "shards")


@contextmanager
def traced_only(rank: int) -> Iterator[None]:
    """Dynamo and autograd work as on a GPU; kernels are not compiled; split graphs are errors."""
    options = {"backend": "aot_eager", "fullgraph": True}
    with patch.object(torch, "compile", partial(torch.compile, **options)):
        yield


def test_compiled_shards_train_what_copies_train(run_config: Make, tmp_path: Path) -> None:
    workers = {"count": 2}
    for name, compute in (("copies", {"compile": "off"}), ("shards", {**SHARD, "compile": "on"})):
        config = run_config(workers=workers, optimizer=EPS, compute=compute)
        around = traced_only if name == "shards" else None
        train_on(2, config, tmp_path / name, around=around)
    assert_same_run(tmp_path / "copies", tmp_path / "shards")


def test_checkpoints_are_interchangeable(run_config: Make, tmp_path: Path) -> None:
    """Phase I on shards, whose checkpoint each worker wrote a share of, goes on as copies, on one
    worker, and on shards to the last bit; and copies go on as shards."""
    workers = {"count": 2, "micro_batch": 2}

    def config(shard: str, **more: Any) -> RunConfig:
        return run_config(
            workers=workers, optimizer=EPS, global_batch=8, compute={"shard": shard}, **more
        )

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_on(2, config("fsdp2"), whole)
    train_on(2, config("fsdp2"), stopped, stop_at=2, around=divides)
    assert list(stopped.glob("checkpoint-*/optimizer-2-of-2-*"))
    for name, world_size, shard in (("same", 2, "fsdp2"), ("copies", 2, "none"), ("1", 1, "fsdp2")):
        folder = shutil.copytree(stopped, tmp_path / name)
        train_on(world_size, config(shard), folder)
        assert_same_run(whole, folder)
    step = "checkpoint-000000006"
    expected, got = weights_of(whole / step), weights_of(tmp_path / "same" / step)
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
    assert numbers_of(whole) == numbers_of(tmp_path / "same")
    train_on(2, config("none"), tmp_path / "from copies", stop_at=5)
    train_on(2, config("fsdp2"), tmp_path / "from copies")
    assert_same_run(whole, tmp_path / "from copies")


def test_unequal_numbers_of_micro_batches_are_refused(run_config: Make, tmp_path: Path) -> None:
    """Workers of 2 and 3 samples would gather weights once and twice."""
    config = run_config(workers={"count": 2, "micro_batch": 2}, compute=SHARD)
    with pytest.raises(Exception, match="equally many micro-batches of all workers: 2 share 5"):
        train_on(2, config, tmp_path)


def test_the_probe_of_single_gradients_is_refused(run_config: Make) -> None:
    termination = {"kind": "gradient_cosine"}
    with pytest.raises(ValidationError, match="gradient_cosine needs gradients of single workers"):
        run_config(compute=SHARD, alignment={"termination": termination})


def test_the_default_is_not_saved() -> None:
    assert "shard" not in ComputeConfig().model_dump()
    assert ComputeConfig(shard="fsdp2").model_dump()["shard"] == "fsdp2"
