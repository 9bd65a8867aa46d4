"""Checkpoints that are written while the training goes on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoints import background, local, remote, state
from pipeline.checkpoints.background import BackgroundCheckpoints, HostMemory
from pipeline.checkpoints.integrity import HashedFile, verify
from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.state import CheckpointContents, load_optimizer
from pipeline.distributed.signals import StopRequest
from pipeline.runs.directory import RunFolder
from pipeline.runs.metrics import read_metrics
from pipeline.storage.files import StorageError, publish
from pipeline.train import ray_trainer
from pipeline.train.local import train_here
from pipeline.train.loop import TrainingLoop, run_training, train
from pipeline.train.optimizer import ClippedAdamW
from pipeline.train.trainer import Trainer
from schemas.errors import NonFiniteError, StoppedError, UserError
from schemas.run import RunConfig
from tests.pipeline.train.test_finite import spoiled
from tests.pipeline.train.test_loop import assert_same_weights, losses, weights
from tests.stores import tiny_run

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
SECONDS = 30.0


def contents_of(seed: int = 0, **changes: Any) -> CheckpointContents:
    """Tensors of all shapes and types that a checkpoint may hold."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    weights = {
        "model": {
            "b.weight": randn(7, 5),
            "a.weight": randn(3, 4).t(),
            "bias": randn(3).bfloat16(),
            "half": randn(2, 2).half(),
            "count": torch.tensor(seed + 3),
            "mask": torch.tensor([True, False]),
            "none": torch.empty(0, 4),
            "double": randn(2).double(),
        },
        "ema": {"b.weight": randn(7, 5)},
    }
    moments = {
        number: {"step": torch.tensor(float(seed)), "exp_avg": randn(5, 7).t()} for number in (0, 1)
    }
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}]
    values = {"weights": weights, "optimizer": {"state": moments, "param_groups": groups}}
    return CheckpointContents(**{**values, "state": {"step": seed}, **changes})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def written(contents: CheckpointContents, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    contents.write(folder)
    return files_of(folder)


# -- files ---------------------------------------------------------------------------------------


def test_files_are_those_of_safetensors_with_their_hashes(tmp_path: Path) -> None:
    contents = contents_of()
    found = written(contents, tmp_path / "a")
    for name, tensors in contents.weights.items():
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "expected")
        assert found[f"{name}.safetensors"] == (tmp_path / "expected").read_bytes()
    listed = verify(tmp_path / "a")["files"]
    assert sorted(listed) == ["ema.safetensors", "model.safetensors", "optimizer.pt"]
    for name, entry in listed.items():
        digest = hashlib.sha256(found[name]).hexdigest()
        assert entry == {"bytes": len(found[name]), "sha256": digest}
    optimizer = load_optimizer(tmp_path / "a")
    assert optimizer["param_groups"] == contents.optimizer["param_groups"]
    for number, one in contents.optimizer["state"].items():
        assert_same_weights(optimizer["state"][number], one)


def test_each_byte_is_written_and_hashed_once_and_none_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    write = HashedFile.write

    def counted(self: HashedFile, data: Any) -> int:
        sizes.append(memoryview(data).nbytes)
        return write(self, data)

    monkeypatch.setattr(HashedFile, "write", counted)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("a file was read again"))
    found = written(contents_of(), tmp_path / "a")
    assert sum(sizes) == sum(len(data) for name, data in found.items() if name != "state.json")


@pytest.mark.parametrize("room", [0, 2000, 9000])
def test_a_full_disk_is_named(tmp_path: Path, room: int) -> None:
    """/dev/full in the place of the disk, from some byte on."""

    class Small(HashedFile):
        left = room

        def write(self, data: Any) -> int:
            self.left -= memoryview(data).nbytes
            if self.left < 0:
                self._file.close()
                full: Any = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
                self._file = full
            return super().write(data)

    with pytest.raises(OSError, match="No space left"), Small(tmp_path / "optimizer.pt") as file:
        torch.save({"a": torch.randn(1000), "b": torch.randn(1000)}, file)  # type: ignore[arg-type]


# -- the copy ------------------------------------------------------------------------------------


def test_a_copy_has_the_bytes_of_its_moment(tmp_path: Path) -> None:
    contents = contents_of(state={"rows": [1, {"of": [2]}]})
    expected = written(contents, tmp_path / "now")
    held = HostMemory(CPU).copy(contents)
    assert held is not None
    copied, event = held
    assert event is None
    for tensor in background._tensors((contents.weights, contents.optimizer)):
        tensor.zero_()
    contents.state["rows"][1]["of"].append(3)
    contents.optimizer["param_groups"][0]["lr"] = 7
    assert written(copied, tmp_path / "later") == expected


def test_memory_is_bounded_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "PIECE", 4096)
    tensors = {str(n): torch.randn(600) for n in range(20)}  # 2,400 bytes: one to a block
    tensors["large"] = torch.randn(3000)
    memory = HostMemory(CPU)
    one, two, few = (
        CheckpointContents({"model": some}, {}, {})
        for some in (tensors, {k: -t for k, t in tensors.items()}, {"0": tensors["0"]})
    )
    first, second = memory.copy(one), memory.copy(two)
    assert first is not None
    assert second is not None
    assert memory.nbytes == 20 * 4096 + 16384
    for name, tensor in tensors.items():
        place = second[0].weights["model"][name]
        assert place.data_ptr() == first[0].weights["model"][name].data_ptr()
        assert place.untyped_storage().nbytes() == tensor.nbytes  # torch.save writes storages
        assert torch.equal(place, -tensor)
    assert memory.copy(few) is not None  # after the termination, projectors have no moments
    assert memory.nbytes == 4096


def test_memory_of_small_blocks_wastes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "PIECE", 1 << 16)
    memory = HostMemory(CPU)
    tensors = {str(n): torch.empty(97 + n) for n in range(1000)}
    assert memory.copy(CheckpointContents({"model": tensors}, {}, {})) is not None
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total <= memory.nbytes < 1.1 * total


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory: you tried"), MemoryError()])
def test_without_memory_the_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Any
) -> None:
    def fail(self: HostMemory, nbytes: int) -> Tensor:
        raise error

    monkeypatch.setattr(HostMemory, "_block", fail)
    threads: list[threading.Thread] = []
    with BackgroundCheckpoints(lambda *_: threads.append(threading.current_thread()), CPU) as saver:
        for step in (1, 2):
            saver.save(step, contents_of())
    assert threads == [threading.main_thread()] * 2
    assert capsys.readouterr().err.count("no memory for a copy of the state") == 1


# -- the training --------------------------------------------------------------------------------


class Steps:
    """Steps that the training has taken, for savers to wait for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self._changed = threading.Condition()
        step, terminate = Trainer.train_step, Trainer.terminate

        def counted(trainer: Trainer, batch: Any) -> Tensor:
            result = step(trainer, batch)
            self.note(f"step {trainer.step}")
            return result

        def ended(trainer: Trainer, evidence: Any) -> None:
            self.note("terminated")
            terminate(trainer, evidence)

        monkeypatch.setattr(Trainer, "train_step", counted)
        monkeypatch.setattr(Trainer, "terminate", ended)

    def note(self, event: str) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait_for(self, event: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: event in self.events, SECONDS), self.events


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def test_the_state_of_the_step_is_saved_although_the_training_goes_on(
    run_config: Make, tmp_path: Path, steps: Steps
) -> None:
    """Both phases; two more steps are taken before anything is written."""
    alignment = {"termination": {"step": 4}}
    config = run_config(steps=9, log_every=4, checkpoint={"every": 3}, alignment=alignment)
    folders = {name: tmp_path / name for name in ("behind", "waiting")}
    keepers = {name: LocalCheckpoints(folder, keep=9) for name, folder in folders.items()}

    def save(step: int, contents: CheckpointContents) -> None:
        if step == 6:
            steps.wait_for("step 8")
        keepers["behind"].save(step, contents)

    train(config, folders["behind"], save)
    off = config.checkpoint.model_copy(update={"background": False})
    waiting = config.model_copy(update={"checkpoint": off})
    train(waiting, folders["waiting"], keepers["waiting"].save)
    for step in (3, 6, 9):
        found, expected = (
            files_of(folder / f"checkpoint-{step:09d}") for folder in folders.values()
        )
        states = [json.loads(files.pop("state.json")) for files in (found, expected)]
        assert found == expected
        for one in states:
            one["config"]["checkpoint"].pop("background", None)
            del one["sha256"]
        assert states[0] == states[1]


def test_a_run_resumed_from_a_checkpoint_of_the_background_is_bit_identical(
    run_config: Make, tmp_path: Path, steps: Steps
) -> None:
    keeper = LocalCheckpoints(tmp_path / "parts", keep=9)

    def save_late(step: int, contents: CheckpointContents) -> None:
        steps.wait_for(f"step {step + 1}")
        keeper.save(step, contents)
        raise StorageError("the storage is gone")

    config = run_config(log_every=4, checkpoint={"every": 4})
    with pytest.raises(StorageError):
        train(config, tmp_path / "parts", save_late)
    assert latest_checkpoint(tmp_path / "parts") == tmp_path / "parts" / "checkpoint-000000004"
    for name in ("parts", "whole"):
        train_here(config, tmp_path / name)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_weights(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_the_next_checkpoint_waits(run_config: Make, tmp_path: Path, steps: Steps) -> None:
    def save(step: int, contents: CheckpointContents) -> None:
        steps.note(f"writing {step}")
        if step < 4:
            steps.wait_for(f"step {step + 2}")
        time.sleep(0.05)
        steps.note(f"written {step}")

    train(run_config(checkpoint={"every": 2}, alignment={"termination": None}), tmp_path, save)
    events = steps.events
    for step in (2, 4):  # no step beyond the next checkpoint's, and no second write
        following = events[events.index(f"writing {step}") :]
        assert f"step {step + 3}" not in following[: following.index(f"written {step}")]
    writes = [event for event in events if event.startswith("writ")]
    assert writes == [f"{what} {step}" for step in (2, 4, 6) for what in ("writing", "written")]


def test_a_stop_waits(run_config: Make, tmp_path: Path, steps: Steps) -> None:
    """At the step of the checkpoint that is being written: nothing new is to be saved."""
    asked = iter([StopRequest.GO_ON] * 2 + [StopRequest.STOP])

    def save(step: int, contents: CheckpointContents) -> None:
        time.sleep(0.2)
        steps.note("written")

    with pytest.raises(StoppedError, match="after step 2 of 6"):
        train(run_config(checkpoint={"every": 2}), tmp_path, save, poll=lambda: next(asked))
    assert steps.events == ["step 1", "step 2", "written"]


def test_a_stop_whose_checkpoint_fails_is_not_one_with_a_checkpoint(
    run_config: Make, tmp_path: Path
) -> None:
    asked = iter([StopRequest.GO_ON] * 2 + [StopRequest.STOP])

    def save(step: int, contents: CheckpointContents) -> None:
        time.sleep(0.2)
        raise UserError("no space left in 'runs'")

    with pytest.raises(UserError, match="no space left"):
        train(run_config(), tmp_path, save, poll=lambda: next(asked))


def test_termination_validation_and_summary_wait(
    run_config: Make, tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = TrainingLoop._validate_if_due

    def noted(loop: TrainingLoop, *, resumed: bool) -> None:
        loop.parts.__dict__["validator"] = SimpleNamespace(due=lambda step: step == 4, run=run)
        validate(loop, resumed=resumed)

    def run(*_: Any, **__: Any) -> list[Any]:
        steps.note("validated")
        return []

    def save(step: int, contents: CheckpointContents) -> None:
        time.sleep(0.1)
        assert not (tmp_path / "summary.json").exists()
        steps.note(f"written {step}")

    monkeypatch.setattr(TrainingLoop, "_validate_if_due", noted)
    train(run_config(checkpoint={"every": 1}), tmp_path, save)
    order = steps.events.index
    assert order("written 3") < order("terminated")
    assert order("written 4") < order("validated")
    assert order("written 6") == len(steps.events) - 1
    assert (tmp_path / "summary.json").exists()


def test_no_thread_outlives_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that frees tensors while the interpreter ends would abort the process."""

    class Slow(Future[None]):
        def set_result(self, result: None) -> None:
            super().set_result(result)
            time.sleep(0.1)

    monkeypatch.setattr(background, "Future", Slow)
    checkpoints = BackgroundCheckpoints(lambda step, contents: None, torch.device("cpu"))
    checkpoints.save(7, CheckpointContents({}, {"a": torch.ones(3)}, {}, None))
    checkpoints.wait()
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint-7"]


def test_a_thread_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    checkpoints = BackgroundCheckpoints(lambda step, contents: None, torch.device("cpu"))
    contents = CheckpointContents({}, {"a": torch.ones(3)}, {}, None)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"), checkpoints:
        checkpoints.save(7, contents)


@pytest.mark.parametrize(("failing", "last"), [(2, 4), (6, 6)])
def test_an_error_of_the_background_ends_the_run_as_it_is(
    run_config: Make, tmp_path: Path, steps: Steps, failing: int, last: int
) -> None:
    error = UserError("no space left in 'runs'")

    def save(step: int, contents: CheckpointContents) -> None:
        if step == failing:
            raise error

    with pytest.raises(UserError) as raised:
        train(run_config(checkpoint={"every": 2}), tmp_path, save)
    assert raised.value is error
    assert f"step {last + 1}" not in steps.events
    assert not (tmp_path / "summary.json").exists()


def test_an_error_of_the_background_is_logged_beside_that_of_the_run(
    run_config: Make, tmp_path: Path, steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(step: int, contents: CheckpointContents) -> None:
        steps.wait_for("failing")
        raise UserError("no space left in 'runs'")

    def poll() -> StopRequest:
        if "step 2" in steps.events:
            steps.note("failing")
            raise RuntimeError("the step failed")
        return StopRequest.GO_ON

    with pytest.raises(RuntimeError, match="the step failed"):
        train(run_config(checkpoint={"every": 2}), tmp_path, save, poll=poll)
    assert "no space left in 'runs'" in capsys.readouterr().err


def test_a_run_that_diverges_names_the_checkpoint_that_was_being_written(
    run_config: Make, tmp_path: Path
) -> None:
    keeper = LocalCheckpoints(tmp_path, keep=9)

    def save(step: int, contents: CheckpointContents) -> None:
        time.sleep(0.2)
        keeper.save(step, contents)

    with (
        spoiled(0, range(3, 9)),
        pytest.raises(NonFiniteError, match="its newest checkpoint is of step 2"),
    ):
        train(run_config(checkpoint={"every": 2}), tmp_path, save)
    assert keeper.steps() == [2]


def test_a_run_that_diverges_names_no_checkpoint_that_failed(
    run_config: Make, tmp_path: Path
) -> None:
    def save(step: int, contents: CheckpointContents) -> None:
        time.sleep(0.5)
        raise UserError("no space left in 'runs'")

    with spoiled(0, range(3, 9)), pytest.raises(UserError, match="no space left"):
        train(run_config(checkpoint={"every": 2}), tmp_path, save)


def test_the_training_waits_for_a_measurement_of_each_checkpoint(
    run_config: Make, tmp_path: Path
) -> None:
    """Networks of ``on_checkpoint`` change settings of the process that the training has too."""
    threads = []
    train_here(
        run_config(steps=2, checkpoint={"every": 1}),
        tmp_path / "run",
        on_checkpoint=lambda folder: threads.append((folder.name, threading.current_thread())),
    )
    main = threading.main_thread()
    assert threads == [(f"checkpoint-{step:09d}", main) for step in (1, 2)]


@pytest.mark.parametrize("on", [True, False])
def test_the_option(run_config: Make, tmp_path: Path, on: bool) -> None:
    threads: list[bool] = []
    config = run_config(checkpoint={"background": on, "every": 3})
    train(
        config,
        tmp_path,
        lambda *_: threads.append(threading.current_thread() is threading.main_thread()),
    )
    assert threads == [not on] * 2
    saved = config.model_dump(mode="json")["checkpoint"]
    assert saved.get("background", True) is on
    assert ("background" in saved) is not on


def test_the_next_update_waits_for_the_copy_on_the_device(
    run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the copy runs beside the next forward and backward pass, which only read weights."""
    order: list[str] = []
    event: Any = SimpleNamespace(
        wait=lambda: order.append("wait"), synchronize=lambda: order.append("copied")
    )
    update, losses, copy = ClippedAdamW.update, Trainer.losses, HostMemory.copy

    def noted(name: str, call: Any) -> Any:
        def noting(*arguments: Any, **options: Any) -> Any:
            order.append(name)
            return call(*arguments, **options)

        return noting

    def on_a_stream(self: HostMemory, contents: CheckpointContents) -> Any:
        held = copy(self, contents)
        assert held is not None
        order.append("copy")
        return held[0], event

    monkeypatch.setattr(ClippedAdamW, "update", noted("update", update))
    monkeypatch.setattr(Trainer, "losses", noted("losses", losses))
    monkeypatch.setattr(HostMemory, "copy", on_a_stream)
    off = {"feature_weight": 0, "attention_weight": 0, "termination": None}

    def save(step: int, contents: CheckpointContents) -> None:
        order.append("write")

    train(run_config(steps=4, checkpoint={"every": 2}, alignment=off), tmp_path, save)
    device = [one for one in order if one not in ("copied", "write")]
    assert device == [
        *["losses", "update"] * 2,
        *["copy", "losses", "wait", "update"],
        *["losses", "update", "copy"],
    ]
    assert [one for one in order if one in ("copied", "write")] == ["copied", "write"] * 2


# -- a process that dies -------------------------------------------------------------------------


class KilledError(BaseException):
    """The end of a process: nothing is caught or cleaned up after it."""


def die_before(module: Any, name: str, *, call: int = 1) -> Callable[[pytest.MonkeyPatch], None]:
    """The process dies when ``name`` is called for the ``call``-th time from now on."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original, calls = getattr(module, name), iter(range(1, 1000))

        def dying(*arguments: Any, **options: Any) -> Any:
            if next(calls) == call:
                raise KilledError
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, dying)

    return patch


POINTS = {
    "before the copy": (die_before(HostMemory, "copy"), 2),
    "in the copy": (die_before(HostMemory, "_fill"), 2),
    "before the first file": (die_before(state, "_write_safetensors"), 2),
    "in the weights": (die_before(HashedFile, "write", call=12), 2),
    "in the optimizer": (die_before(HashedFile, "flush", call=1), 2),
    "before the state": (die_before(state, "write_state"), 2),
    "before it is published": (die_before(os, "replace"), 2),
    "before the disk has it": (die_before(local, "_sync"), 4),
    "before an old one is deleted": (die_before(local, "to_prune"), 4),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, random_store: Any) -> Path:
    """The run, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    values = {**tiny_run(), "store": random_store.url, "checkpoint": {"every": 2}}
    train_here(RunConfig.model_validate(values), folder)
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_dies_at_any_point_has_a_valid_checkpoint_and_continues(
    run_config: Make, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """The checkpoint of step 4 is disturbed."""
    die, left = POINTS[point]
    config, folder = run_config(checkpoint={"every": 2, "keep": 9}), tmp_path / "run"
    keeper, written, boundaries = (
        LocalCheckpoints(folder, keep=9),
        threading.Event(),
        iter(range(9)),
    )

    def save(step: int, contents: CheckpointContents) -> None:
        keeper.save(step, contents)
        written.set()

    with monkeypatch.context() as patches:

        def poll() -> StopRequest:
            if next(boundaries) == 3:
                assert written.wait(SECONDS)
                die(patches)
            return StopRequest.GO_ON

        with pytest.raises(KilledError):
            train(config, folder, save, poll=poll)
    newest = latest_checkpoint(folder)
    assert newest is not None
    assert newest.name == f"checkpoint-{left:09d}"
    train_here(config, folder)
    assert not list(folder.glob(".tmp-*"))
    assert losses(folder) == losses(whole)
    assert_same_weights(weights(folder), weights(whole))


# -- resuming ------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_and_hashed_once_while_the_run_is_built(
    run_config: Make, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    built, hashed = threading.Event(), []
    digest, build = hashlib.file_digest, Trainer.__init__

    def noting(file: Any, name: Any) -> Any:
        assert built.wait(SECONDS)
        hashed.append(Path(file.name).name)
        return digest(file, name)

    def noted(self: Trainer, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        built.set()

    monkeypatch.setattr(hashlib, "file_digest", noting)
    monkeypatch.setattr(Trainer, "__init__", noted)
    train_here(run_config(steps=7, checkpoint={"every": 9}), folder)
    listed = verify(whole / "checkpoint-000000006", hashes=False)["files"]
    assert sorted(hashed) == sorted(listed)
    assert losses(folder)[:6] == losses(whole)


def test_the_training_waits_for_a_callback(run_config: Make, tmp_path: Path) -> None:
    """It may sample, which sets the arithmetic of the process and its generator."""
    called: list[tuple[str, bool]] = []

    def callback(checkpoint: Path) -> None:
        here = threading.current_thread() is threading.main_thread()
        called.append((checkpoint.name, here))

    train_here(run_config(steps=4, checkpoint={"every": 2}), tmp_path, on_checkpoint=callback)
    assert called == [("checkpoint-000000002", True), ("checkpoint-000000004", True)]


# -- Ray and object stores -----------------------------------------------------------------------


@pytest.fixture
def poller(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Poller of a control that has received one request, and records its calls."""
    heard: list[int] = []

    def heartbeat(saved: int) -> tuple[bool, int]:
        heard.append(saved)
        return False, 1

    monkeypatch.setattr(ray_trainer, "POLL_SECONDS", 0.005)
    monkeypatch.setattr("pipeline.train.ray_trainer.ray.get", lambda value: value)
    control = SimpleNamespace(heartbeat=SimpleNamespace(remote=heartbeat), heard=heard)
    one = ray_trainer.ControlPoller(control)
    deadline = time.monotonic() + SECONDS
    while one() is StopRequest.GO_ON and time.monotonic() < deadline:
        time.sleep(0.005)
    yield one
    one.close()


def test_a_request_is_met_once_and_served_when_the_checkpoint_is_published(
    run_config: Make, poller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray may end the worker as soon as the request is served."""
    heard = poller.control.heard
    folder: Any = SimpleNamespace(publish=lambda: None)
    folder.checkpoints = SimpleNamespace(save=lambda *_: heard.append("published"))
    saver = ray_trainer._Saver(folder, poller)
    assert poller() is StopRequest.SAVE
    saver.begin()
    assert poller() is StopRequest.GO_ON
    time.sleep(0.05)
    assert set(heard) == {0}
    saver(4, contents_of())
    deadline = time.monotonic() + SECONDS
    while heard[-1] != 1 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert heard.index("published") < heard.index(1)


def test_rows_of_an_object_store_are_published_before_the_checkpoint_that_counts_them(
    run_config: Make, tmp_path: Path, poller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(output=f"memory://{tmp_path.name}", checkpoint={"every": 2})
    counted: list[tuple[int, int]] = []

    def check(filesystem: Any, path: Path, target: str) -> None:
        if path.name == "state.json":
            rows = json.loads(path.read_text())["metrics_rows"]
            metrics = filesystem.cat_file(f"{folder._root}/metrics.jsonl")
            counted.append((rows, metrics.count(b"\n")))
        publish(filesystem, path, target)

    monkeypatch.setattr(remote, "publish", check)
    with RunFolder(config) as folder:
        saver = ray_trainer._Saver(folder, poller)
        run_training(config, folder.path, saver, nullcontext(None), before_save=saver.begin)
        assert len(read_metrics(folder.path / "metrics.jsonl")) == 7
        assert folder.checkpoints.steps() == [2, 4, 6]
    assert [rows for rows, _ in counted] == [2, 5, 7]  # with the event of the termination
    assert all(published >= rows for rows, published in counted)
