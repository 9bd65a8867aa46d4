"""Errors that a restart cannot fix end a job at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from schemas.run import RunConfig
from tests.stores import make_random_store

ROOT = Path(__file__).parents[2]
COUNTED = """
import os, sys
sys.path.insert(0, "jobs")
from pipeline.train import ray_trainer
import train_haste

worker = ray_trainer._worker
def counted_worker(arguments):
    with open(os.environ["HASTE_TEST_STARTS"], "a") as file:
        file.write("x")
    return worker(arguments)
ray_trainer._worker = counted_worker
train_haste.run_command(train_haste.main)
"""


def test_a_damaged_shard_is_reported_without_a_restart(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    store = make_random_store(tmp_path / "bad-store")
    Path(store.root, store.record(2).streams["latents"][0].file).unlink()
    config = run_config(store=store.url, steps=12, workers={"cpus_per_worker": 0.5})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    starts = tmp_path / "starts"
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, "--config", str(file)],
        cwd=ROOT,
        env={**os.environ, "HASTE_TEST_STARTS": str(starts)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 2, done.stderr
    assert "stream 'latents', shard 2 of" in done.stderr.splitlines()[-1]
    assert "is missing" in done.stderr.splitlines()[-1]
    assert starts.read_text() == "x"
