"""Fading of the alignment's weights before the termination, and their warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints.local import latest_checkpoint
from pipeline.checkpoints.state import read_state
from pipeline.runs.metrics import read_metrics
from pipeline.train.local import train_here
from pipeline.train.trainer import Trainer
from schemas.run import RunConfig
from tests.pipeline.train.test_loop import assert_same_weights, losses, run, weights

Make = Callable[..., RunConfig]
FIRES_AT_2 = {
    "gradient_cosine": {"start": 2, "every": 9, "samples": 4, "times": [0.5], "threshold": 1},
    "residual_plateau": {"start": 2, "every": 9, "tolerance": 1e9},
}


def factors(folder: Path) -> list[float | None]:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "event" not in row]
    return [row.get("alignment_factor") for row in rows]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 1, *((1 - math.cos(math.pi * s)) / 2 for s in (0.75, 0.5, 0.25))]),
    ],
)
def test_a_fixed_step_is_the_end_of_its_ramp(
    run_config: Make, tmp_path: Path, kind: str, expected: list[float]
) -> None:
    termination = {"kind": "fixed", "step": 5, "ramp": {"kind": kind, "steps": 4}}
    summary = run(run_config(alignment={"termination": termination}), tmp_path / "a")
    assert summary["termination_step"] == 5
    assert summary["bytes_read"]["maps"]["after"] == 0
    assert factors(tmp_path / "a") == pytest.approx([*expected, None])


@pytest.mark.parametrize("kind", FIRES_AT_2)
def test_other_triggers_begin_their_ramp_when_they_fire(
    run_config: Make, tmp_path: Path, kind: str
) -> None:
    termination = {"kind": kind, **FIRES_AT_2[kind], "ramp": {"steps": 3}}
    config = run_config(alignment={"termination": termination})
    summary = run(config, tmp_path / "whole")
    assert summary["termination_step"] == 5
    assert factors(tmp_path / "whole") == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, None])
    events = [row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "event" in row]
    assert [(row["step"], row["event"]) for row in events] == [
        (2, "trigger observation"),
        (5, "alignment terminated"),
    ]
    assert events[0]["ramp_began_at_step"] == events[1]["ramp_began_at_step"] == 2
    newest = latest_checkpoint(tmp_path / "whole")
    assert newest is not None
    termination_saved = read_state(newest).termination
    assert termination_saved is not None
    assert termination_saved["trigger"] == kind
    for stop in (1, 3, 4, 6):  # before, in and after the ramp
        train_here(config.model_copy(update={"steps": stop}), tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert factors(tmp_path / "parts") == factors(tmp_path / "whole")
    assert_same_weights(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_warm_up_ends_at_full_weight(run_config: Make, tmp_path: Path) -> None:
    alignment = {"warmup": {"steps": 2}, "termination": None}
    run(run_config(alignment=alignment), tmp_path / "a")
    assert factors(tmp_path / "a") == [0.5, 1, 1, 1, 1, 1]


def test_the_total_is_weighted_by_the_factor(run_config: Make, tmp_path: Path) -> None:
    """A run whose factor is constantly a half is a run of half weights."""
    half = {"termination": None, "feature_weight": 0.25, "attention_weight": 0.25}
    run(run_config(steps=1, alignment=half), tmp_path / "half")
    run(
        run_config(steps=1, alignment={"termination": None, "warmup": {"steps": 2}}), tmp_path / "a"
    )
    first, second = losses(tmp_path / "half"), losses(tmp_path / "a")
    assert first[0]["grad_norm"] == pytest.approx(second[0]["grad_norm"], rel=1e-6)
    assert first[0]["feature"] == second[0]["feature"]  # losses are measured without it


def test_the_factor_is_no_tensor(
    run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    step = Trainer.train_step

    def stepping(self: Trainer, batch: Any) -> torch.Tensor:
        seen.append(self.factor)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", stepping)
    termination = {"kind": "fixed", "step": 3, "ramp": {"steps": 2}}
    run(run_config(steps=3, alignment={"termination": termination}), tmp_path / "a")
    assert seen == [1.0, 1.0, 0.5]
    assert all(type(value) is float for value in seen)


def test_a_dry_trigger_has_no_ramp(run_config: Make, tmp_path: Path) -> None:
    termination = {"kind": "fixed", "step": 3, "dry": True, "ramp": {"steps": 2}}
    run(run_config(alignment={"termination": termination}), tmp_path / "a")
    assert factors(tmp_path / "a") == [1] * 6


def test_none_by_default_and_not_in_saved_configs(run_config: Make, tmp_path: Path) -> None:
    run(run_config(steps=1), tmp_path / "a")
    assert factors(tmp_path / "a") == [None]
    saved = run_config().model_dump(mode="json")["alignment"]
    assert "warmup" not in saved
    assert saved["termination"] == {"kind": "fixed", "dry": False, "step": 3}


@pytest.mark.parametrize(
    ("alignment", "complaint"),
    [
        ({"termination": {"step": 3, "ramp": {"steps": 4}}}, r"ramp\.steps 4 is longer .* step 3"),
        ({"termination": {"step": 3, "ramp": {"steps": 0}}}, r"ramp\.steps"),
        ({"termination": {"step": 3}, "warmup": {"steps": 4}}, r"warmup\.steps 4 is longer .* 3"),
        ({"termination": {"step": 3, "ramp": {"kind": "cubic", "steps": 1}}}, r"ramp\.kind"),
        (
            {
                "feature_weight": 0,
                "attention_weight": 0,
                "termination": None,
                "warmup": {"steps": 1},
            },
            r"nothing to warm up",
        ),
    ],
)
def test_bad_ramps_are_refused(run_config: Make, alignment: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        run_config(alignment=alignment)
