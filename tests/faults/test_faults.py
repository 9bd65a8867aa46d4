"""The harness itself, with two of its faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.environments import ROOT
from tests.faults.processes import MARK, kill_all, pids_with_title, processes_of, stopped
from tests.faults.timeouts import WaitTimeoutError, wait_for


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_encoder_and_a_killed_worker(tmp_path: Path) -> None:
    counts = {}
    for fault, count in (("kill-encoder", 1), ("kill-worker", 2)):
        command = ["-m", "tests.faults", "--store", str(tmp_path), "--faults", fault]
        done = subprocess.run(
            [sys.executable, *command, "--count", str(count), "--json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (line,) = done.stdout.splitlines()
        counts = json.loads(line)
    assert counts == {"faults": 2, "survived": 2, "lost": 0, "duplicated": 0, "hung": 0}
    left = {path.name.partition("-")[0] for path in tmp_path.iterdir()}
    assert left == {"undisturbed", "results.jsonl"}


def test_only_marked_processes_and_their_descendants_are_found() -> None:
    sleeper = "import subprocess, sys, time; subprocess.run(['sleep', '60'], env={})"
    marked = subprocess.Popen([sys.executable, "-c", sleeper], env={**os.environ, MARK: "a"})
    other = subprocess.Popen(["sleep", "61"], env={**os.environ, MARK: "b"})
    try:
        wait_for(lambda: bool(pids_with_title("a", "sleep 60")), 20, "the child")
        assert {p.parent for p in processes_of("a") if p.title == "sleep 60"} == {marked.pid}
        assert other.pid not in {p.pid for p in processes_of("a")}
        kill_all("a")
        assert marked.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        marked.kill()
        other.kill()
        other.wait()


def test_a_stopped_process_continues() -> None:
    process = subprocess.Popen(["sleep", "60"])
    stat = Path(f"/proc/{process.pid}/stat")
    try:
        with stopped([process.pid]):
            wait_for(lambda: stat.read_text().split()[2] == "T", 5, "the stop")
        wait_for(lambda: stat.read_text().split()[2] != "T", 5, "the end of the stop")
    finally:
        process.kill()
        process.wait()


def test_a_wait_has_a_limit_and_names_its_event() -> None:
    began = time.monotonic()
    with pytest.raises(WaitTimeoutError, match="the moon: not after 0 s"):
        wait_for(lambda: False, 0.1, "the moon")
    assert time.monotonic() - began < 5
