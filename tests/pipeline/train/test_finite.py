"""Runs whose losses, gradients, weights or observations are not finite."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import fsspec
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.alignment.termination import ResidualPlateauTrigger, StepLosses
from pipeline.checkpoints.integrity import STATE, write_state
from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.selection import latest_valid
from pipeline.checkpoints.state import load_optimizer, verify_finite
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import StopRequest
from pipeline.models.ema import Ema
from pipeline.models.factory import RANDOM, Uninitialised
from pipeline.runs.directory import RunFolder
from pipeline.runs.metrics import read_metrics
from pipeline.runs.reader import read_run
from pipeline.train import loop, ray_trainer, trainer
from pipeline.train.finite import FiniteWatch
from pipeline.train.gradient_probe import GradientProbe
from pipeline.train.local import train_here
from pipeline.train.loop import train
from pipeline.train.step_meter import StepMeter
from pipeline.train.trainer import Trainer
from schemas.alignment import AlignmentConfig, ResidualPlateau
from schemas.errors import NonFiniteError, UserError
from schemas.run import RunConfig
from tests.pipeline.train.test_loop import losses, run, weights
from tests.processes import train_on

Make = Callable[..., RunConfig]
LOSS = Trainer.losses
OFF = {"feature_weight": 0, "attention_weight": 0, "termination": None}


@contextmanager
def spoiled(
    rank: int,
    steps: Container[int],
    value: float = math.nan,
    loss: int = 0,
    only: int = 0,
    messages: Path | None = None,
) -> Iterator[None]:
    """``value`` is added to a loss of rank ``only`` at some steps, counted from 1; its gradient
    stays finite unless ``value`` is NaN. The error of a rank is written to the folder
    ``messages`` instead of being raised."""

    def losses(self: Trainer, *arguments: Any) -> Tensor:
        found = LOSS(self, *arguments)
        if rank != only or self.step + 1 not in steps:
            return found
        one = torch.zeros_like(found)
        one[loss] = value
        return found * (1 + one) if math.isnan(value) else found + one

    with patch.object(Trainer, "losses", losses):
        try:
            yield
        except NonFiniteError as error:
            if messages is None:
                raise
            (messages / f"rank-{rank}").write_text(str(error))


def optimizer_of(folder: Path) -> dict[str, Tensor]:
    newest = latest_checkpoint(folder)
    assert newest is not None
    state = load_optimizer(newest)["state"]
    return {f"{n}.{key}": value for n, one in state.items() for key, value in one.items()}


def assert_same_run(one: Path, other: Path) -> None:
    for read in (weights, optimizer_of):
        got, expected = read(one), read(other)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name


def checkpoints(folder: Path) -> list[int]:
    return LocalCheckpoints(folder, keep=1).steps()


@pytest.mark.parametrize(
    ("loss", "name"), [(0, "denoising loss"), (1, "feature loss"), (2, "attention loss")]
)
def test_a_run_stops_at_its_next_row_and_keeps_what_was_finite(
    run_config: Make, tmp_path: Path, loss: int, name: str
) -> None:
    """One loss is not finite at step 12: seen with the row of step 20, or before the checkpoint of
    step 15, whichever is first."""
    for every, left, last in ((100, [], 20), (5, [10], 15)):
        config = run_config(
            steps=60,
            log_every=10,
            checkpoint={"every": every, "keep": 1},
            alignment={"termination": None},
        )
        folder = tmp_path / str(every)
        with spoiled(0, range(12, 61), loss=loss), pytest.raises(NonFiniteError) as error:
            run(config, folder)
        assert f"the {name} of worker 0 is not finite at step 12; " in str(error.value)
        assert "\n" not in str(error.value)
        assert ("newest checkpoint is of step 10" in str(error.value)) == bool(left)
        assert checkpoints(folder) == left
        assert all(one.isfinite().all() for one in (weights(folder) if left else {}).values())
        (event,) = [row for row in read_metrics(folder / "metrics.jsonl") if "event" in row]
        assert (event["step"], event["event"]) == (last, "not finite")
        assert event["reason"] == f"the {name} of worker 0 is not finite at step 12"
        record = read_run(str(folder))
        assert record.events == []
        assert any("not finite at step" in warning for warning in record.warnings)


def test_a_learning_rate_that_kills_at_once(run_config: Make, tmp_path: Path) -> None:
    """Weights of 1e30 are finite, and what is computed from them is not. The same command fails
    the same way again, with the same checkpoint."""
    config = run_config(
        steps=60,
        log_every=10,
        checkpoint={"every": 1, "keep": 3},
        optimizer={"learning_rate": 1e30},
        alignment=OFF,
    )
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"denoising loss of worker 0 .* at step 2; its"):
            train_here(config, tmp_path / "run")
        assert checkpoints(tmp_path / "run") == [1]
        verify_finite(tmp_path / "run" / "checkpoint-000000001")


def test_a_gradient_alone_is_named_as_a_norm(run_config: Make, tmp_path: Path) -> None:
    def clip(parameters: Any, *_: Any) -> Tensor:
        return torch.full((), math.inf)

    with (
        patch.object(torch.nn.utils, "clip_grad_norm_", clip),
        pytest.raises(NonFiniteError, match="the gradient norm of worker 0 is not finite at step"),
    ):
        run(run_config(), tmp_path)


@pytest.mark.parametrize("request_", [StopRequest.STOP, StopRequest.SAVE])
def test_a_request_saves_no_dead_run(
    run_config: Make, tmp_path: Path, request_: StopRequest
) -> None:
    config = run_config(log_every=100, steps=50)
    asked = iter([*[StopRequest.GO_ON] * 4, *[request_] * 46])
    save = LocalCheckpoints(tmp_path, keep=1).save
    with (
        spoiled(0, range(3, 4)),
        pytest.raises(NonFiniteError, match="step 3; it has no checkpoint"),
    ):
        train(config, tmp_path, save, poll=lambda: next(asked))
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("name", ["model weights", "ema weights", "optimizer state"])
@pytest.mark.parametrize("on_nan", ["stop", "skip_step"])
def test_weights_that_overflow_are_not_saved_or_sampled(
    run_config: Make, tmp_path: Path, name: str, on_nan: str
) -> None:
    """All losses up to step 4 are finite."""
    step = Trainer.train_step

    def overflowing(self: Trainer, batch: Any) -> Tensor:
        result = step(self, batch)
        if self.step == 4:
            with torch.no_grad():
                next(t for t in self.tensors()[name] if t.ndim == 2)[0, 0] = math.inf
        return result

    config = run_config(checkpoint={"every": 2}, train={"on_nan": on_nan})
    with (
        patch.object(Trainer, "train_step", overflowing),
        pytest.raises(NonFiniteError, match=f"the {name} of worker 0 is not finite; its newest"),
    ):
        run(config, tmp_path)
    assert checkpoints(tmp_path) == [2]


@pytest.mark.parametrize(
    ("value", "on_nan"), [(math.nan, "stop"), (math.inf, "stop"), (math.inf, "skip_step")]
)
def test_all_workers_stop_with_one_error(
    run_config: Make, tmp_path: Path, value: float, on_nan: str
) -> None:
    """Only the losses of worker 1 are broken; infinite ones have finite gradients, so that worker 0
    sees nothing of them."""
    config = run_config(
        steps=30,
        log_every=10,
        checkpoint={"every": 4, "keep": 1},
        train={"on_nan": on_nan, "max_skipped": 3},
    )
    around = partial(spoiled, steps=range(6, 31), value=value, only=1, messages=tmp_path)
    train_on(2, config, tmp_path / "run", around=around)
    first, second = ((tmp_path / f"rank-{rank}").read_text() for rank in range(2))
    assert first == second
    assert "the denoising loss of worker 1 is not finite at step 6" in first
    assert checkpoints(tmp_path / "run") == ([4] if on_nan == "stop" else [8])
    verify_finite(tmp_path / "run" / f"checkpoint-{4 if on_nan == 'stop' else 8:09d}")


@pytest.mark.parametrize("optimizer", ["fused", "plain"])
def test_skipping_changes_nothing_without_a_bad_step(
    run_config: Make, tmp_path: Path, optimizer: str
) -> None:
    for on_nan in ("stop", "skip_step"):
        config = run_config(train={"on_nan": on_nan}, compute={"optimizer": optimizer})
        run(config, tmp_path / on_nan)
    assert_same_run(tmp_path / "skip_step", tmp_path / "stop")
    assert losses(tmp_path / "skip_step") == losses(tmp_path / "stop")
    rows = read_metrics(tmp_path / "skip_step" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows if "event" not in row] == [0] * 6
    assert "skipped_steps" not in (tmp_path / "stop" / "metrics.jsonl").read_text()


def passing_by(rank: int, steps: set[int]) -> Any:
    """Training that does not take some steps, counted from 1."""
    step = Trainer.train_step

    def taken(self: Trainer, batch: Any) -> Tensor:
        if self.step + 1 not in steps:
            return step(self, batch)
        self.step += 1
        return torch.zeros(5)

    return patch.object(Trainer, "train_step", taken)


@pytest.mark.parametrize(
    ("optimizer", "world_size", "value"),
    [
        ("fused", 1, math.nan),
        ("plain", 1, math.inf),
        ("fused", 2, math.nan),
        ("fused", 2, math.inf),
    ],
)
def test_a_skipped_step_was_never_taken(
    run_config: Make, tmp_path: Path, optimizer: str, world_size: int, value: float
) -> None:
    """The first step, one in Phase I and one in Phase II, on one of the workers."""
    bad = {1, 3, 5}
    config = run_config(compute={"optimizer": optimizer}, train={"on_nan": "skip_step"})
    around = partial(spoiled, steps=bad, value=value, only=world_size - 1)
    train_on(world_size, config, tmp_path / "skipped", around=around)
    train_on(world_size, config, tmp_path / "untaken", around=partial(passing_by, steps=bad))
    assert_same_run(tmp_path / "skipped", tmp_path / "untaken")
    moments = optimizer_of(tmp_path / "skipped")
    assert {float(value) for name, value in moments.items() if name.endswith(".step")} == {3.0}


def test_rows_count_skipped_steps_and_leave_them_out(
    run_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A row of steps 1 to 4, of which 2 is skipped, and a row of steps 5 and 6, both skipped. The
    losses of a step do not depend on whether a row is written after it."""
    config = run_config(train={"on_nan": "skip_step"}, alignment=OFF)
    bad = {2, 5, 6}
    with spoiled(0, bad), caplog.at_level(logging.INFO):
        run(config, tmp_path / "each")
        run(config.model_copy(update={"log_every": 4}), tmp_path / "mean")
    each = losses(tmp_path / "each")
    first, second = losses(tmp_path / "mean")
    for name in ("denoising", "grad_norm"):
        expected = [row[name] for row in each if row["step"] in (1, 3, 4)]
        assert first[name] == pytest.approx(sum(expected) / 3, rel=1e-6)
        assert name not in second
    text = (tmp_path / "mean" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert [row["skipped_steps"] for row in map(json.loads, text.splitlines())] == [1, 2]
    assert "  1 steps skipped  " in caplog.text


def test_a_resumed_row_counts_skipped_steps(run_config: Make, tmp_path: Path) -> None:
    config = run_config(log_every=4, checkpoint={"every": 3}, train={"on_nan": "skip_step"})
    with spoiled(0, {2}):
        run(config, tmp_path / "whole")
        train_on(1, config, tmp_path / "parts", stop_at=3)
        train_on(1, config, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    first, *_ = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert first["skipped_steps"] == 1


def test_skipping_is_bounded(run_config: Make, tmp_path: Path) -> None:
    """Two steps in a row are skipped twice; three in a row end the run at the third."""
    train_options = {"on_nan": "skip_step", "max_skipped": 2}
    config = run_config(train=train_options, steps=20, alignment=OFF)
    with (
        spoiled(0, {2, 3, 5, 6, 9, 10, 11}),
        pytest.raises(NonFiniteError, match="at step 9, the first of 3 such steps in a row; "),
    ):
        run(config.model_copy(update={"log_every": 7}), tmp_path)
    with spoiled(0, {2, 3, 5, 6}):
        run(config, tmp_path / "enough")


def test_steps_do_not_wait_for_the_device() -> None:
    """Tensors of the meta device have no values, and raise an error where one is asked for."""
    group = ProcessGroup(device=torch.device("meta"))
    result, skipped = torch.ones(5, device="meta"), torch.ones((), device="meta").bool()
    watch, meter = FiniteWatch(group, 3), StepMeter(group, 4)
    trigger = ResidualPlateauTrigger(ResidualPlateau(kind="residual_plateau"), AlignmentConfig())
    layer = torch.nn.Linear(2, 2, device="meta")
    for flag in (None, skipped):
        for step in range(2):
            watch.note(step, result, flag)
            meter.add(result, 0.0, flag)
            trigger.record(StepLosses(*result[1:4]), flag)
            Ema(layer, 0.5).update(layer, flag)
    with pytest.raises((RuntimeError, NotImplementedError)):
        watch.check({})


def poison(checkpoint: Path, name: str) -> None:
    """Make one number of a checkpoint NaN, its checksums right."""
    state = json.loads((checkpoint / STATE).read_text())
    (checkpoint / STATE).unlink()
    path = checkpoint / name
    if path.suffix == ".pt":
        optimizer = torch.load(path, weights_only=True)
        optimizer["state"][3]["exp_avg_sq"].view(-1)[0] = math.inf
        torch.save(optimizer, path)
    else:
        tensors = load_file(path)
        list(tensors.values())[2].view(-1)[0] = math.nan
        save_file(tensors, path)
    write_state(checkpoint, {k: v for k, v in state.items() if k not in ("files", "sha256")})


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt"])
def test_a_dead_checkpoint_of_an_earlier_version_is_not_continued(
    run_config: Make, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An earlier one is used; without one, the run is refused."""
    folder, config = tmp_path / "run", run_config(checkpoint={"every": 2})
    run(config.model_copy(update={"steps": 4}), folder)
    newest = folder / "checkpoint-000000004"
    poison(newest, name)
    with pytest.raises(UserError, match=r"checkpoint '.*4' cannot be continued: its .* not finite"):
        run(config, folder, newest)
    with caplog.at_level(logging.WARNING):
        train_here(config, folder)
    assert f"{name} " in caplog.text
    assert "not finite; trying step 2" in caplog.text
    run(config, tmp_path / "whole")
    assert_same_run(folder, tmp_path / "whole")
    for step in (2, 4, 6):
        poison(folder / f"checkpoint-{step:09d}", name)
    with pytest.raises(UserError, match="holds 3 checkpoints and no valid one"):
        train_here(config.model_copy(update={"steps": 8}), folder)
    # sampling chooses by checksums, and refuses by name
    assert latest_valid(LocalCheckpoints(folder, keep=1), folder) is not None


@pytest.mark.parametrize("termination", [2, 50])
def test_a_resumed_run_loads_all_that_it_does_not_initialise(
    run_config: Make, tmp_path: Path, termination: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights that are left as they are allocated are NaN here."""
    config = run_config(checkpoint={"every": 3}, alignment={"termination": {"step": termination}})
    run(config, tmp_path / "whole")
    run(config.model_copy(update={"steps": 3}), tmp_path / "parts")
    left: list[str] = []

    class Poisoned(Uninitialised):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = super().__torch_function__(function, types, args, kwargs)
            if function in RANDOM:
                left.append(function.__name__)
                result.data.fill_(math.nan)
            return result

    monkeypatch.setattr(trainer, "Uninitialised", Poisoned)
    run(config, tmp_path / "parts", tmp_path / "parts" / "checkpoint-000000003")
    assert {"normal_", "uniform_", "kaiming_uniform_"} == set(left)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def cosines(*values: float) -> Any:
    return patch.object(GradientProbe, "gradient_cosines", return_value=list(values))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_observation_that_is_not_finite_decides_nothing(
    run_config: Make, tmp_path: Path, value: float
) -> None:
    termination = {
        "kind": "gradient_cosine",
        "start": 2,
        "every": 2,
        "times": [0.1, 0.5],
        "threshold": 1,
    }
    alignment = {"termination": termination}
    with (
        cosines(0.5, value),
        pytest.raises(NonFiniteError, match=r"gradient_cosine_t0.5 after step 2 is not finite"),
    ):
        run(run_config(alignment=alignment), tmp_path / "stop")
    config = run_config(alignment=alignment, train={"on_nan": "skip_step"})
    with cosines(0.5, value):
        assert run(config, tmp_path / "skip")["termination_step"] is None
    events = [row for row in read_metrics(tmp_path / "skip" / "metrics.jsonl") if "event" in row]
    assert {(row["event"], row["gradient_cosine"]) for row in events} == {
        ("trigger observation", None)
    }
    assert events[0]["gradient_cosine_t0.1"] == 0.5
    assert "is not finite: ignored" in events[0]["reason"]


def plateau() -> ResidualPlateauTrigger:
    options = {"kind": "residual_plateau", "fast": 0.5, "slow": 0.9, "start": 0}
    return ResidualPlateauTrigger(ResidualPlateau.model_validate(options), AlignmentConfig())


def test_a_plateau_of_infinite_averages_is_none() -> None:
    """|fast - inf| <= tolerance * inf is true."""
    trigger = plateau()
    trigger.record(StepLosses(*torch.ones(3)))
    trigger._averages = torch.tensor([1.0, math.inf], dtype=torch.float64)
    decision = trigger.observe(1, None, lambda values: values)  # type: ignore[arg-type]
    assert not decision.terminate
    assert decision.not_finite == ["residual_slow"]


def test_a_plateau_does_not_see_skipped_steps() -> None:
    """Nor do its averages know that there were any, also when all were skipped so far."""
    seen, unseen = plateau(), plateau()
    broken = StepLosses(*torch.full((3,), math.nan))
    no, yes = torch.zeros((), dtype=torch.bool), torch.ones((), dtype=torch.bool)
    seen.record(broken, yes)
    first = seen.observe(1, None, lambda values: values)  # type: ignore[arg-type]
    assert not first.terminate
    for number in range(5):
        values = StepLosses(*torch.rand(3, generator=torch.Generator().manual_seed(number)))
        seen.record(values, no)
        unseen.record(values)
        seen.record(broken, yes)
    one, other = (t.state_dict(lambda v: [v.tolist()]) for t in (seen, unseen))
    assert one == other
    decisions = [t.observe(9, None, lambda values: values) for t in (seen, unseen)]  # type: ignore[arg-type]
    assert decisions[0] == decisions[1]


def test_ray_is_told_not_to_restart_a_dead_run(
    run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver ends as soon as a failure is reported."""
    told: list[str] = []
    remote = SimpleNamespace(remote=told.append)
    context = SimpleNamespace(
        get_world_rank=lambda: 1, get_world_size=lambda: 2, get_local_rank=lambda: 1
    )
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(RunFolder, "require_shared", lambda self: None)
    monkeypatch.setattr(ray_trainer, "set_up_worker_logging", lambda: None)

    def dead(*_: Any, **__: Any) -> None:
        raise NonFiniteError("run 'tiny' stopped: the denoising loss of worker 1 is not finite")

    monkeypatch.setattr(loop, "run_training", dead)
    monkeypatch.setattr(ray_trainer, "_resumes", lambda *_: False)  # asks the other ranks
    values = run_config().model_dump(mode="json")
    with pytest.raises(NonFiniteError):
        ray_trainer._worker({"config": values, "control": SimpleNamespace(fail=remote)})
    assert told == ["run 'tiny' stopped: the denoising loss of worker 1 is not finite"]


def test_the_reason_reaches_an_object_store(run_config: Make) -> None:
    config = run_config(output="memory://dead", alignment=OFF)
    with pytest.raises(NonFiniteError), RunFolder(config) as folder, spoiled(0, range(3, 9)):
        train(config, folder.path, folder.checkpoints.save)
    rows = fsspec.filesystem("memory").cat_file("/dead/tiny/metrics.jsonl").decode().splitlines()
    assert [json.loads(row).get("event") for row in rows] == [None, None, "not finite"]


def test_names_on_disk_are_the_same_unless_asked(run_config: Make) -> None:
    assert "train" not in run_config().model_dump()
    config = run_config(train={"on_nan": "skip_step"})
    values = config.model_dump(mode="json")
    assert values["train"] == {"on_nan": "skip_step", "max_skipped": 10}
    assert RunConfig.model_validate(values) == config
