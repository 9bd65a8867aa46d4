"""Samples and evaluations of a run on an object store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jobs.evaluate import main as evaluate
from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.store import Store
from pipeline.train.loop import train
from schemas.run import RunConfig
from tests.forks import COMMAND
from tests.s3 import SECRET, SeaweedFS
from tests.stores import tiny_run

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_samples_and_evaluations_of_a_run_on_s3(
    s3: SeaweedFS, random_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    config = RunConfig.model_validate({**tiny_run(), "steps": 2, "store": random_store.url})
    train(config, folder, LocalCheckpoints(folder, keep=1).save)
    run = f"{s3.bucket()}/runs/tiny"
    filesystem = fsspec.filesystem("s3")
    filesystem.put(str(folder), run, recursive=True)

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    options = {
        "checkpoint": run,
        "autoencoder": "demo",
        "num": 6,
        "batch-size": 3,
        "sampler.steps": 2,
        "workers.count": 1,
        "npz": f"{run}/samples.npz",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # names of sockets must be short
    finished = subprocess.run(
        [sys.executable, *COMMAND, "jobs/sample.py", *words, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr
    assert SECRET not in finished.stdout + finished.stderr
    assert json.loads(finished.stdout)["images"] == 6
    assert list(temporary.glob("haste-*")) == []
    with filesystem.open(f"{run}/samples.npz", "rb") as file, np.load(file) as archive:
        assert archive["arr_0"].shape[0] == 6
        about = json.loads(str(archive["about"]))
    assert about["checkpoint"] == f"{run}/checkpoint-000000002"

    filesystem.get_file(f"{run}/samples.npz", str(tmp_path / "samples.npz"))
    network = ["--network", "test_resnet", "--network-weights", "random", "--network-size", "32"]
    sides = ["--samples", str(tmp_path / "samples.npz"), "--reference"]
    assert evaluate([*sides, str(tmp_path / "samples.npz"), *network, "--record", run]) == 0
    (line,) = filesystem.cat_file(f"{run}/evaluations.jsonl").decode().splitlines()
    assert json.loads(line).items() >= {"step": 2, "weights": "ema", "samples": 6}.items()
