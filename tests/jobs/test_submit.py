"""The README's cluster recipe on this machine: `ray start --head`, then `ray job submit`, in a home
where a command has used a local cluster before, and with Ray's own defaults."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

Submit = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


LOCAL = """
from pipeline.distributed.ray_cluster import ray_cluster
with ray_cluster(None):
    pass
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of a user who has run `make demo`."""
    home = tmp_path_factory.mktemp("home")
    values = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    values |= {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOCAL], cwd=ROOT, env=values, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not list(home.rglob("*token*"))
    return values


def readme_command(begin: str) -> list[str]:
    lines = (line.strip() for line in (ROOT / "README.md").read_text().splitlines())
    return next(line for line in lines if line.startswith(begin)).partition("#")[0].split()


@pytest.fixture(scope="module")
def dashboard(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of the dashboard of a new one-node cluster."""
    port, dashboard_port = free_port(), free_port()
    folder = tmp_path_factory.mktemp("ray")
    arguments = [
        *readme_command("ray start --head"),
        *("--block", "--num-cpus=2", "--disable-usage-stats"),
        f"--port={port}",
        f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={free_port()}",  # another cluster may have the default one
        f"--temp-dir={Path('/tmp') / f'haste-{port}'}",  # long socket paths fail
    ]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{dashboard_port}"
        _wait(address, environment)
        yield address
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)


def _wait(dashboard: str, environment: dict[str, str]) -> None:
    """Until a job starts: the agent that starts jobs comes up after the dashboard."""
    deadline = time.monotonic() + 240
    while True:
        arguments = ["ray", "job", "submit", "--address", dashboard, "--", "true"]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            return
        booting = "No available agent" in done.stderr or "Failed to connect" in done.stderr
        if not booting or time.monotonic() > deadline:
            raise RuntimeError(done.stderr)
        time.sleep(0.5)


@pytest.fixture
def submit(dashboard: str, environment: dict[str, str]) -> Submit:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        arguments = ["ray", "job", "submit", "--address", dashboard, "--working-dir", "."]
        return subprocess.run(
            [*arguments, "--", *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_extract_and_train_as_submitted_jobs(submit: Submit, tmp_path: Path) -> None:
    store, runs = tmp_path / "store", tmp_path / "runs"
    extract = ("python", "-m", "pipeline.extract", "--dataset", "demo", "--store", str(store))
    done = submit(*extract)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1797 samples" in done.stdout
    train = (
        *("python", "jobs/train_haste.py", "--config", "jobs/configs/demo.yaml"),
        *("--store", str(store), "--output", str(runs), "--steps", "12"),
        *("--alignment.termination.step", "6"),
    )
    done = submit(*train)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((runs / "demo" / "summary.json").read_text())
    assert summary["termination_step"] == 6
    assert summary["bytes_read"]["maps"]["after"] == 0


def test_a_bad_job_prints_one_line(submit: Submit, tmp_path: Path) -> None:
    done = submit("python", "jobs/train_haste.py", "--store", str(tmp_path))
    assert done.returncode != 0
    assert f"error: --store '{tmp_path}' holds no store: manifest.json is missing" in done.stdout
