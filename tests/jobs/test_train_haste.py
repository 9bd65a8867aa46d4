"""Training through Ray Train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.train_haste import train_run
from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.runs.metrics import read_metrics
from pipeline.train.loop import train
from schemas.errors import UserError
from schemas.run import RunConfig

pytestmark = pytest.mark.usefixtures("two_cpus")
Make = Callable[..., RunConfig]


def test_two_workers_train_what_one_process_trains(
    run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A global batch of 5 on 2 workers: slices of 2 and 3 samples, through the termination. The
    output is below the current folder, which is not that of Ray's workers."""
    alone = tmp_path / "alone"
    one = train(run_config(), alone, LocalCheckpoints(alone, keep=1).save)
    monkeypatch.chdir(tmp_path.parent)
    workers = {"count": 2, "cpus_per_worker": 0.5}
    two = train_run(run_config(workers=workers, output=tmp_path.name))
    folder = tmp_path / "tiny"
    assert two["termination_step"] == one["termination_step"] == 3
    assert two["bytes_read"]["maps"]["after"] == 0
    assert two["bytes_read"]["latents"]["after"] > 0
    names = ("step", "phase", "denoising", "feature", "attention", "grad_norm")
    rows = [
        [[row[n] for n in names if n in row] for row in read_metrics(path / "metrics.jsonl")]
        for path in (alone, folder)
    ]
    assert len(rows[0]) == len(rows[1]) == 7
    for expected, got in zip(*rows, strict=True):
        assert got == pytest.approx(expected, rel=2e-5)

    # the same name again: nothing is left to do; with more steps it resumes
    assert train_run(run_config(workers={"count": 2, "cpus_per_worker": 0.5})) == two
    assert len(read_metrics(folder / "metrics.jsonl")) == 7
    train_run(run_config(steps=8))
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")][-3:] == [6, 7, 8]
    with pytest.raises(UserError, match=r"4 for student.depth, the config says 3"):
        train_run(run_config(student={"depth": 3}))


def test_a_summary_of_fewer_steps_is_not_the_end(
    run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run got more steps and was stopped before a later checkpoint."""
    folder = tmp_path / "tiny"
    config = run_config()
    summary = train(config, folder, LocalCheckpoints(folder, keep=1).save)
    started: list[int] = []
    monkeypatch.setattr(
        "pipeline.train.ray_trainer.fit", lambda config: started.append(config.steps)
    )
    assert train_run(config) == summary
    assert started == []
    (folder / "summary.json").write_text(json.dumps({**summary, "steps": 3}))
    train_run(config)
    assert started == [config.steps]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"store": None}, "--store is missing"),
        ({"store": "/no/store"}, "--store '/no/store' holds no store: manifest.json is missing"),
        ({"workers": {"gpus_per_worker": 1}}, "asks for 1 x 1 GPU; the Ray cluster has 0 GPUs"),
        ({"workers": {"count": 3}}, "--workers.count asks for 3 x 1 CPU"),
    ],
)
def test_bad_requests_are_one_line(
    run_config: Make,
    overrides: dict[str, object],
    complaint: str,
) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        train_run(run_config(**overrides))
    assert "\n" not in str(error.value)
