"""Training on Ray through kills, signals and changes of the cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from ray.train.v2._internal.execution.controller.state import ResizingState, RunningState

from jobs.train_haste import train_run
from pipeline.checkpoints.selection import latest_state
from pipeline.distributed.signals import StopRequest
from pipeline.runs.directory import RunFolder
from pipeline.runs.metrics import read_metrics
from pipeline.train.local import train_here
from pipeline.train.ray_trainer import CheckpointBeforeResize, ControlPoller, RunControl, scaling
from schemas.errors import UserError
from schemas.run import RunConfig
from tests.forks import COMMAND

Make = Callable[..., RunConfig]
ROOT = Path(__file__).parents[2]
SMALL = {"cpus_per_worker": 0.5}
SLOWED = """
import sys, time
sys.path.insert(0, "jobs")
from pipeline.train import ray_trainer
import train_haste

worker = ray_trainer._worker
def slow_worker(arguments):
    from pipeline.train.trainer import Trainer
    step = Trainer.train_step
    def slowly(self, batch):
        time.sleep(0.1)
        return step(self, batch)
    Trainer.train_step = slowly
    return worker(arguments)
ray_trainer._worker = slow_worker
train_haste.run_command(train_haste.main)
"""


def denoising(folder: Path) -> list[float]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [row["denoising"] for row in rows if "event" not in row]


def write_config(config: RunConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return path


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_to_the_driver_ends_the_job_with_a_checkpoint(
    run_config: Make, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """A terminal sends Ctrl-C to all processes of the job, including its private cluster."""
    config = run_config(steps=400, workers=SMALL)
    path = write_config(config, tmp_path / "config.yaml")
    process = subprocess.Popen(
        [sys.executable, *COMMAND, "-c", SLOWED, "--config", str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    folder = tmp_path / "tiny"
    try:
        deadline = time.monotonic() + 150
        while len(read_metrics(folder / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == code, output
    # Ray's own actors (their lines begin with a pid) may fail while the cluster shuts down
    job_lines = [line for line in output.splitlines() if " pid=" not in line]
    assert not any("Traceback" in line for line in job_lines), output
    assert "run the same command again to continue" in output
    state = latest_state(RunFolder(config).checkpoints)
    assert state is not None
    assert 3 <= state.step < 400
    again = config.model_copy(update={"steps": state.step + 3})
    train_here(again, folder)
    train_here(again, tmp_path / "whole")
    assert denoising(folder) == denoising(tmp_path / "whole")


@pytest.mark.usefixtures("two_cpus")
def test_killed_right_after_a_checkpoint_resumes_from_it(
    run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker dies as soon as a checkpoint is complete, before it is reported, and again after
    a later one. Ray alone would restart at step 0."""
    from pipeline.train import ray_trainer

    marks = tmp_path / "marks"
    marks.mkdir()
    worker = ray_trainer._worker

    def dying_worker(arguments: dict[str, object]) -> str | None:
        from pipeline.checkpoints.local import LocalCheckpoints
        from pipeline.train.trainer import Trainer

        save, step = LocalCheckpoints.save, Trainer.train_step

        def save_and_die(self: LocalCheckpoints, number: int, write: Callable[..., None]) -> None:
            save(self, number, write)
            if number in (2, 4) and not (marks / f"died{number}").exists():
                (marks / f"died{number}").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        def counted(self: Trainer, batch: object) -> object:
            with (marks / "steps").open("a") as file:
                file.write(f"{self.step}\n")
            return step(self, batch)  # type: ignore[arg-type]

        LocalCheckpoints.save, Trainer.train_step = save_and_die, counted  # type: ignore
        return worker(arguments)

    monkeypatch.setattr(ray_trainer, "_worker", dying_worker)
    # in the background, steps taken meanwhile would be repeated
    train_run(run_config(checkpoint={"every": 2, "background": False}, workers=SMALL))
    assert (marks / "steps").read_text().split() == ["0", "1", "2", "3", "4", "5"]
    train_here(run_config(), tmp_path / "whole")
    assert denoising(tmp_path / "tiny") == denoising(tmp_path / "whole")


@pytest.mark.usefixtures("two_cpus")
def test_elastic_trains_on_the_available_workers(run_config: Make, tmp_path: Path) -> None:
    """Resources for one of two workers, then for two."""
    tight = {"count": 2, "min_count": 1, "cpus_per_worker": 1.5}
    train_run(run_config(steps=3, workers=tight))
    train_run(run_config(steps=6, workers={**tight, "cpus_per_worker": 1}))
    train_here(run_config(), tmp_path / "whole")
    assert denoising(tmp_path / "tiny") == pytest.approx(denoising(tmp_path / "whole"), rel=2e-5)


@pytest.mark.usefixtures("two_cpus")
def test_elastic_needs_resources_for_the_minimum(run_config: Make) -> None:
    workers = {"count": 4, "min_count": 3, "cpus_per_worker": 1}
    with pytest.raises(UserError, match=r"--workers\.min-count asks for 3 x 1 CPU; the Ray"):
        train_run(run_config(workers=workers))


def test_scaling(run_config: Make) -> None:
    assert scaling(run_config(workers={"count": 2}), 0).num_workers == 2
    assert scaling(run_config(workers={"count": 2, "min_count": 2}), 0).num_workers == 2
    elastic = scaling(run_config(workers={"count": 4, "min_count": 2}), 1.0)
    assert elastic.num_workers == (2, 4)
    assert elastic.elasticity_enabled
    assert elastic.resources_per_worker == {"CPU": 1, "GPU": 1}


def test_a_request_to_save_is_pending_until_it_is_done() -> None:
    control = RunControl()
    assert control.save() is None  # no worker trains: none to wait for
    assert control.heartbeat(0) == (False, 0)
    request = control.save()
    assert request == 1
    assert control.is_pending(request)
    assert control.heartbeat(0) == (False, 1)
    assert control.is_pending(request)
    control.stop()
    assert control.heartbeat(1) == (True, 1)
    assert not control.is_pending(request)


class Idle:
    """An actor in place of a worker."""


def resized(control: Any, workers: Sequence[Any]) -> None:
    """Play what Ray's controller does with a group of ``workers`` that it resizes."""
    callback = CheckpointBeforeResize(control)
    group = SimpleNamespace(get_workers=lambda: [SimpleNamespace(actor=w) for w in workers])
    callback.after_worker_group_start(group)
    callback.after_controller_state_update(RunningState(), RunningState())
    callback.after_controller_state_update(RunningState(), ResizingState(scaling_decision=None))


def await_training(control: Any) -> None:
    deadline = time.monotonic() + 30
    while ray.get(control.save.remote()) is None and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.mark.usefixtures("two_cpus")
def test_the_controller_waits_for_a_checkpoint_before_it_resizes() -> None:
    control = ray.remote(RunControl).options(num_cpus=0).remote()
    workers = [ray.remote(Idle).options(num_cpus=0).remote() for _ in range(2)]
    poller = ControlPoller(control)
    seen: list[StopRequest] = []

    def train_on() -> None:
        while not seen:
            if poller() is StopRequest.SAVE:
                seen.append(poller())
                poller.saved(poller.requested)
            time.sleep(0.05)

    await_training(control)
    thread = threading.Thread(target=train_on)
    thread.start()
    resized(control, workers)
    thread.join(10)
    poller.close()
    assert seen == [StopRequest.SAVE]
    assert poller() is StopRequest.GO_ON


@pytest.mark.usefixtures("two_cpus")
def test_the_controller_waits_for_no_checkpoint_of_a_group_that_lost_a_worker() -> None:
    """The others wait for it in a collective and can save no more."""
    control = ray.remote(RunControl).options(num_cpus=0).remote()
    workers = [ray.remote(Idle).options(num_cpus=0).remote() for _ in range(2)]
    poller = ControlPoller(control)
    await_training(control)
    thread = threading.Thread(target=resized, args=(control, workers))
    thread.start()
    thread.join(2)
    assert thread.is_alive()  # both live
    ray.kill(workers[1])
    thread.join(20)
    assert not thread.is_alive()
    assert poller() is StopRequest.SAVE  # it was still pending
    poller.close()
