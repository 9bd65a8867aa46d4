"""Triggers in real runs: rows in the metrics, decisions in the checkpoint, the probe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.state import read_state
from pipeline.distributed.process_group import ProcessGroup
from pipeline.runs.metrics import read_metrics
from pipeline.store import SampleOrder, Store
from pipeline.train.gradient_probe import GradientProbe
from pipeline.train.loop import train
from pipeline.train.trainer import Trainer
from schemas.run import RunConfig

Make = Callable[..., RunConfig]


def run(config: RunConfig, folder: Path, resume: Path | None = None) -> dict[str, Any]:
    return train(config, folder, LocalCheckpoints(folder, keep=9).save, resume=resume)


def events(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if "event" in row]


def test_gradient_cosine_in_a_run(run_config: Make, tmp_path: Path) -> None:
    """A threshold of 1 fires at the first probe; each probe has a row, the last the decision."""
    termination = {"kind": "gradient_cosine", "start": 2, "every": 2, "samples": 9, "threshold": 1}
    summary = run(run_config(alignment={"termination": termination}), tmp_path / "a")
    assert summary["termination_step"] == 2
    assert [row["event"] for row in events(tmp_path / "a")] == ["alignment terminated"]
    newest = latest_checkpoint(tmp_path / "a")
    assert newest is not None
    decided = read_state(newest).termination
    assert decided is not None
    assert decided["trigger"] == "gradient_cosine"
    assert -1 <= decided["gradient_cosine"] <= 1
    assert summary["bytes_read"]["maps"]["after"] == 0


def test_dry_mode_only_logs(run_config: Make, tmp_path: Path) -> None:
    for kind in ({"kind": "gradient_cosine", "samples": 4, "threshold": 1}, {"kind": "fixed"}):
        extra = {"step": 4} if kind["kind"] == "fixed" else {"start": 2, "every": 2}
        folder = tmp_path / str(kind["kind"])
        summary = run(run_config(alignment={"termination": {**kind, **extra, "dry": True}}), folder)
        assert summary["termination_step"] is None
        steps = [row["step"] for row in events(folder)]
        assert steps == ([4] if kind["kind"] == "fixed" else [2, 4])
        assert {row["event"] for row in events(folder)} == {"alignment would terminate (dry)"}
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if "event" not in row]
        assert all(row["phase"] == 1 for row in rows)


def test_probing_changes_nothing(run_config: Make, tmp_path: Path) -> None:
    """A run whose trigger probes and never fires is bit-identical to a run without a trigger."""
    termination = {"kind": "gradient_cosine", "start": 1, "every": 1, "samples": 7, "threshold": -1}
    run(run_config(alignment={"termination": termination}), tmp_path / "looking")
    run(run_config(alignment={"termination": None}), tmp_path / "plain")
    rows = [
        [
            row["denoising"]
            for row in read_metrics(tmp_path / name / "metrics.jsonl")
            if "denoising" in row
        ]
        for name in ("looking", "plain")
    ]
    assert rows[0] == rows[1]


def test_plateau_killed_between_two_probes_decides_the_same(
    run_config: Make, tmp_path: Path
) -> None:
    termination = {
        "kind": "residual_plateau",
        "start": 4,
        "every": 4,
        "fast": 0.5,
        "slow": 0.9,
        "tolerance": 0.004,
    }
    config = run_config(
        steps=40, alignment={"termination": termination}, checkpoint={"every": 6, "keep": 9}
    )
    whole = run(config, tmp_path / "whole")
    assert whole["termination_step"] is not None
    assert whole["termination_step"] > 6
    parts = tmp_path / "parts"
    run(config.model_copy(update={"steps": 6}), parts)
    resumed = run(config, parts, resume=latest_checkpoint(parts))
    assert resumed["termination_step"] == whole["termination_step"]
    assert events(parts) == events(tmp_path / "whole")


def test_probe_is_the_cosine_of_the_two_gradients(run_config: Make, random_store: Store) -> None:
    """Compared with gradients of all samples at once, on 1 rank and split over 2."""
    config = run_config()
    trainer = Trainer(config, random_store, ProcessGroup())
    # at initialisation every gate is 0 and gradients vanish in the block
    torch.manual_seed(0)
    for parameter in trainer.module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    order = SampleOrder(0, random_store.index().samples_per_shard)
    probe = GradientProbe(trainer, random_store, order)
    got = probe.gradient_cosines([0.1, 0.7], 22)
    (batch,) = probe._batches(22)
    assert len(set(batch.positions.tolist())) == 22
    block = trainer.module.student.blocks[config.alignment.feature_depth - 1]
    for time, cosine in zip([0.1, 0.7], got, strict=True):
        flat = []
        for part in ("alignment", "denoising"):
            trainer.module.zero_grad()
            losses = trainer.losses(
                trainer.module, trainer.inputs(batch, time=time), trainer.targets_of(batch)
            )
            (trainer.alignment_loss(losses) if part == "alignment" else losses[0]).backward()
            flat.append(torch.cat([p.grad.flatten() for p in block.parameters()]))  # type: ignore[union-attr]
        expected = torch.cosine_similarity(flat[0], flat[1], dim=0).item()
        assert cosine == pytest.approx(expected, abs=1e-5)
        assert abs(cosine) > 1e-4
    assert probe.bytes_read["maps"] > 0
