"""Training on two Ray nodes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from schemas.run import RunConfig
from tests.faults.environments import ROOT, Nodes, process_variables
from tests.faults.processes import kill_all
from tests.forks import WANTED
from tests.pipeline.train.test_loop import losses, weights
from tests.processes import train_on


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Two nodes of one CPU each, separate from the cluster of other tests."""
    with ExitStack() as stack:
        ray_folder = Path(tempfile.mkdtemp(prefix="hn-", dir="/tmp"))  # short socket paths
        stack.callback(shutil.rmtree, ray_folder, ignore_errors=True)
        mark = uuid.uuid4().hex
        stack.callback(kill_all, mark)
        folder = tmp_path / "nodes"
        folder.mkdir()
        variables = process_variables(mark, folder, ray_folder) | {WANTED: "1"}
        yield stack.enter_context(Nodes(folder, variables))


def test_two_nodes_train_what_two_processes_train(
    run_config: Callable[..., RunConfig], nodes: Nodes, tmp_path: Path
) -> None:
    """Each worker fills a node; the run is resumed once and passes the termination."""
    config = run_config(workers={"count": 2, "cpus_per_worker": 1})
    train_on(2, config, tmp_path / "processes")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    command = [sys.executable, "jobs/train_haste.py", "--config", str(file)]
    command += ["--ray-address", str(nodes.address)]
    for steps in (2, config.steps):
        done = subprocess.run(
            [*command, "--steps", str(steps)],
            cwd=ROOT,
            env=nodes.variables,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
    folder = Path(config.output) / config.name
    assert losses(folder) == losses(tmp_path / "processes")
    one, other = weights(folder), weights(tmp_path / "processes")
    assert all(one[name].equal(other[name]) for name in one)
