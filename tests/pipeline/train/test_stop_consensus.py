"""Runs that are asked to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.checkpoints.state import CheckpointContents
from pipeline.cli.command import run_command
from pipeline.distributed.signals import StopRequest, StopSignals
from pipeline.runs.metrics import read_metrics
from pipeline.train.local import train_here
from pipeline.train.loop import train
from schemas.errors import StoppedError
from schemas.run import RunConfig

Make = Callable[..., RunConfig]
ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys, time
from pathlib import Path
from pipeline.train.local import train_here
from pipeline.train.trainer import Trainer
from pipeline.cli.command import run_command
from schemas.run import RunConfig

step = Trainer.train_step
def slowly(self, batch):
    time.sleep(0.05)
    return step(self, batch)
Trainer.train_step = slowly
run_command(lambda argv: train_here(RunConfig.model_validate_json(argv[0]), Path(argv[1])) and 0)
"""


def start(config: RunConfig, folder: Path) -> subprocess.Popen[str]:
    """Start a run in a new process, at most 20 steps per second."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, config.model_dump_json(), str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(read_metrics(folder / "metrics.jsonl")) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not get so far")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_ends_a_process_with_a_checkpoint(
    run_config: Make, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The same command then resumes bit-identically."""
    config, folder = run_config(steps=60), tmp_path / "a"
    process = start(config, folder)
    try:
        wait_for_rows(folder, process, 2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert f"{number.name}: stopping after a checkpoint" in errors
    last = errors.splitlines()[-1]
    (left,) = LocalCheckpoints(folder, keep=1).steps()
    assert 2 <= left < 60
    assert last == (
        f"run 'tiny' was stopped after step {left} of 60; run the same command again to continue"
    )
    train_here(config, folder)
    train_here(config, tmp_path / "whole")
    found = [
        [row["denoising"] for row in read_metrics(path / "metrics.jsonl") if "event" not in row]
        for path in (folder, tmp_path / "whole")
    ]
    assert found[0] == found[1]
    for file in (tmp_path / "whole" / "checkpoint-000000060").glob("*.safetensors"):
        got = load_file(folder / "checkpoint-000000060" / file.name)
        assert all(torch.equal(got[name], tensor) for name, tensor in load_file(file).items())


def test_a_killed_process_resumes_from_its_latest_checkpoint(
    run_config: Make, tmp_path: Path
) -> None:
    """SIGKILL at any moment; it cannot be handled."""
    config = run_config(steps=40, checkpoint={"every": 1})
    folder = tmp_path / "a"
    for rows in (3, 20):
        process = start(config, folder)
        wait_for_rows(folder, process, rows)
        process.kill()
        process.communicate()
    train_here(config, folder)
    train_here(config, tmp_path / "whole")
    found = [
        [row["denoising"] for row in read_metrics(path / "metrics.jsonl") if "event" not in row]
        for path in (folder, tmp_path / "whole")
    ]
    assert found[0] == found[1]
    assert not list(folder.glob(".tmp-*"))


def test_an_unchanged_state_is_not_saved_again(run_config: Make, tmp_path: Path) -> None:
    saved: list[int] = []

    def save(step: int, contents: CheckpointContents) -> None:
        saved.append(step)

    with pytest.raises(StoppedError, match="stopped after step 0 of 6"):
        train(run_config(), tmp_path / "a", save, poll=lambda: StopRequest.STOP)
    assert saved == []


def test_a_request_to_save_is_met_and_the_run_continues(run_config: Make, tmp_path: Path) -> None:
    saved: list[int] = []
    asked = iter([StopRequest.GO_ON, StopRequest.GO_ON, StopRequest.SAVE, *[StopRequest.GO_ON] * 9])

    def save(step: int, contents: CheckpointContents) -> None:
        saved.append(step)

    summary = train(run_config(), tmp_path / "a", save, poll=lambda: next(asked))
    assert saved == [2, 6]
    assert summary["steps"] == 6


@pytest.fixture
def python_signals() -> Iterator[None]:
    """Python's own handler of Ctrl-C, which background processes of a shell lack."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_signals")
def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        assert signals() is StopRequest.GO_ON
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # Slurm sends it twice: the checkpoint is not cut off
        assert signals() is StopRequest.STOP
        assert signals.exit_code == 143
        with pytest.raises(KeyboardInterrupt):  # but Ctrl-C now means at once
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_stopped_command_ends_with_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> int:
        raise StoppedError("stopped; go on", 130)

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as error:
        run_command(main)
    assert error.value.code == 130
    assert capsys.readouterr().err == "stopped; go on\n"
