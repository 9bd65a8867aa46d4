"""Complete runs in one process without Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.state import CheckpointContents
from pipeline.runs.compatibility import check_store
from pipeline.runs.metrics import read_metrics
from pipeline.store import Store
from pipeline.train.loop import train
from schemas.errors import UserError
from schemas.run import RunConfig

Make = Callable[..., RunConfig]


def run(config: RunConfig, folder: Path, resume: Path | None = None) -> dict[str, Any]:
    checkpoints = LocalCheckpoints(folder, keep=config.checkpoint.keep)
    return train(config, folder, checkpoints.save, resume=resume)


def losses(folder: Path) -> list[dict[str, float]]:
    """Rows of the metrics without values that depend on timing or storage."""
    names = ("step", "phase", "denoising", "feature", "attention", "grad_norm")
    rows = read_metrics(folder / "metrics.jsonl")
    return [{n: row[n] for n in names if n in row} for row in rows if "event" not in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(folder)
    assert newest is not None
    return {
        f"{name}.{key}": tensor
        for name in sorted(path.stem for path in newest.glob("*.safetensors"))
        for key, tensor in load_file(newest / f"{name}.safetensors").items()
    }


def test_phases_and_summary(run_config: Make, tmp_path: Path) -> None:
    summary = run(run_config(), tmp_path / "a")
    rows = losses(tmp_path / "a")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["phase"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert all(("feature" in row) == (row["phase"] == 1) for row in rows)
    assert summary["steps"] == 6
    assert summary["termination_step"] == 3
    assert summary["bytes_read"]["maps"]["before"] > 0
    assert summary["bytes_read"]["maps"]["after"] == 0
    assert summary["bytes_read"]["latents"]["after"] > 0
    assert json.loads((tmp_path / "a" / "summary.json").read_text()) == summary


def test_no_teacher_file_is_opened_after_the_termination(
    run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, int]] = []
    taken = 0
    plain = os.open

    def counting(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append((str(path), taken))
        return plain(path, *args, **kwargs)

    from pipeline.train.trainer import Trainer

    step = Trainer.train_step

    def stepping(self: Trainer, batch: Any) -> torch.Tensor:
        nonlocal taken
        taken = batch.step + 1
        return step(self, batch)

    monkeypatch.setattr(os, "open", counting)
    monkeypatch.setattr(Trainer, "train_step", stepping)
    # prefetching this far would read teacher bytes of Phase II
    run(run_config(steps=8, data={"window": 1, "prefetch": 4}), tmp_path / "a")
    teacher = [when for path, when in opened if "/maps/" in path]
    latents = [when for path, when in opened if "/latents/" in path]
    assert teacher
    assert max(teacher) < 3
    assert max(latents) > 3


def test_vanilla_run_never_opens_the_teacher(run_config: Make, tmp_path: Path) -> None:
    off = {"feature_weight": 0, "attention_weight": 0, "termination": None}
    summary = run(run_config(alignment=off), tmp_path / "a")
    assert summary["bytes_read"]["maps"] == {"before": 0, "after": 0}
    assert summary["termination_step"] is None
    assert not any(name.startswith("projector") for name in weights(tmp_path / "a"))


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4, 5])
def test_resumed_run_is_bit_identical(run_config: Make, tmp_path: Path, killed_at: int) -> None:
    """Killed in Phase I, at the termination and in Phase II, also between rows of the metrics."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(run_config(log_every=4), whole)

    class KilledError(Exception):
        pass

    every = run_config(log_every=4, checkpoint={"every": killed_at})
    checkpoints = LocalCheckpoints(parts, keep=3)

    def save_then_die(step: int, contents: CheckpointContents) -> None:
        checkpoints.save(step, contents)
        raise KilledError

    with pytest.raises(KilledError):
        train(every, parts, save_then_die)
    assert latest_checkpoint(parts) == parts / f"checkpoint-{killed_at:09d}"
    summary = run(every, parts, resume=latest_checkpoint(parts))
    assert losses(parts) == losses(whole)
    assert summary["termination_step"] == 3
    assert_same_weights(weights(parts), weights(whole))


def assert_same_weights(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("went_on_to", [4, 5])
def test_a_run_killed_between_checkpoints_repeats_no_row(
    run_config: Make, tmp_path: Path, went_on_to: int
) -> None:
    """The event of the termination at 3 is written after the checkpoint of step 3, so it is written
    again after the resume."""
    folder = tmp_path / "a"
    run(run_config(), tmp_path / "whole")
    config = run_config(checkpoint={"every": 3})
    run(config.model_copy(update={"steps": went_on_to}), folder)
    run(config, folder, folder / "checkpoint-000000003")
    rows = [
        [(row["step"], row.get("event")) for row in read_metrics(path / "metrics.jsonl")]
        for path in (folder, tmp_path / "whole")
    ]
    assert rows[0] == rows[1]


def test_projectors_stay_in_the_checkpoint_frozen(run_config: Make, tmp_path: Path) -> None:
    run(run_config(checkpoint={"every": 3}), tmp_path / "a")
    at_end = weights(tmp_path / "a")
    earlier = tmp_path / "a" / "checkpoint-000000003"
    for key, tensor in load_file(earlier / "projector.safetensors").items():
        assert torch.equal(tensor, at_end[f"projector.{key}"])
    optimizer = torch.load(
        tmp_path / "a" / "checkpoint-000000006" / "optimizer.pt", weights_only=True
    )
    assert len(optimizer["param_groups"]) == 1


def test_checkpoint_of_another_model_is_refused(run_config: Make, tmp_path: Path) -> None:
    run(run_config(), tmp_path / "a")
    with pytest.raises(UserError, match=r"another model.*4 for student\.depth.*says 5") as error:
        run(run_config(student={"depth": 5}), tmp_path / "a", latest_checkpoint(tmp_path / "a"))
    assert "\n" not in str(error.value)


def test_damaged_checkpoint_is_named(run_config: Make, tmp_path: Path) -> None:
    run(run_config(), tmp_path / "a")
    newest = latest_checkpoint(tmp_path / "a")
    assert newest is not None
    whole = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged: model\.safetensors"):
        run(run_config(), tmp_path / "a", newest)


def test_only_the_newest_checkpoints_stay(run_config: Make, tmp_path: Path) -> None:
    run(run_config(checkpoint={"every": 1, "keep": 2}), tmp_path / "a")
    names = sorted(path.name for path in (tmp_path / "a").glob("checkpoint-*"))
    assert names == ["checkpoint-000000005", "checkpoint-000000006"]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"student": {"latent_size": 16}}, r"holds latents 4x8x8 of 64 px.*expects 4x16x16"),
        ({"student": {"num_classes": 3}}, r"5 classes, student.num_classes is 3"),
        ({"alignment": {"teacher_layers": [0, 1]}}, r"teacher layer 0; the store holds 1, 2, 3"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(
    run_config: Make, random_store: Store, overrides: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        check_store(run_config(**overrides), random_store.manifest)
    assert "\n" not in str(error.value)


def test_rows_beyond_the_checkpoint_are_dropped_on_resume(run_config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    run(run_config(steps=4, checkpoint={"every": 2}), folder)
    run(run_config(checkpoint={"every": 2}), folder, folder / "checkpoint-000000002")
    assert [row["step"] for row in losses(folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"data": {"window": 3}}, r"data\.window"),
        ({"optimizer": {"learning_rate": 0.5}}, r"optimizer\.learning_rate"),
    ],
)
def test_resume_refuses_what_would_change_the_run(
    run_config: Make, tmp_path: Path, overrides: dict[str, Any], key: str
) -> None:
    run(run_config(steps=4), tmp_path / "a")
    newest = latest_checkpoint(tmp_path / "a")
    with pytest.raises(UserError, match=key):
        run(run_config(**overrides), tmp_path / "a", newest)
    run(run_config(data={"prefetch": 5}), tmp_path / "a", newest)


def test_rows_are_means_since_the_last_row_across_checkpoints(
    run_config: Make, tmp_path: Path
) -> None:
    off = {"termination": None}
    run(run_config(alignment=off), tmp_path / "each")
    run(run_config(alignment=off, log_every=3, checkpoint={"every": 2}), tmp_path / "rows")
    each = [row["denoising"] for row in losses(tmp_path / "each")]
    rows = [row["denoising"] for row in losses(tmp_path / "rows")]
    assert rows == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], rel=1e-6)
