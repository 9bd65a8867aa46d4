"""Checkpoints at URLs, resolved for sampling and export."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from jobs.export import main as export
from pipeline.checkpoints.integrity import STATE, DamagedCheckpointError
from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.checkpoints.resolve import find_checkpoint, local_copy
from pipeline.checkpoints.student import load_student, load_trained_student
from pipeline.sampling.worker import SampleWorker
from pipeline.store import Store
from pipeline.train.loop import train
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.sample import SampleConfig
from tests.stores import tiny_run

URL = "memory://drawn/run"
NEWEST = f"{URL}/checkpoint-000000004"
EARLIER = f"{URL}/checkpoint-000000002"


@pytest.fixture(scope="module")
def run(random_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig.model_validate(
        {**tiny_run(), "steps": 4, "store": random_store.url, "checkpoint": {"every": 2}}
    )
    train(config, folder, LocalCheckpoints(folder, keep=2).save)
    return folder


@pytest.fixture
def memory(run: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """Filesystem with a copy of the run at ``URL``."""
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(run), "/drawn/run", recursive=True)
    yield filesystem
    filesystem.rm("/drawn", recursive=True)


@pytest.mark.parametrize(
    ("name", "step", "found"),
    [
        (URL, None, NEWEST),
        (f"{URL}/", None, NEWEST),
        (URL, 2, EARLIER),
        (URL, 3, NEWEST),
        (EARLIER, None, EARLIER),
        (EARLIER, 4, EARLIER),
    ],
)
def test_checkpoint_of_a_url(
    memory: fsspec.AbstractFileSystem, name: str, step: int | None, found: str, run: Path
) -> None:
    assert find_checkpoint(name, step) == found
    local = name.replace(URL, str(run))
    assert find_checkpoint(local, step) == found.replace(URL, str(run))
    assert find_checkpoint(f"file://{local}", step) == found.replace(URL, str(run))


def test_a_damaged_checkpoint_is_skipped(
    memory: fsspec.AbstractFileSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    memory.pipe_file("/drawn/run/checkpoint-000000004/ema.safetensors", b"short")
    assert find_checkpoint(URL) == EARLIER
    assert f"'{NEWEST}' is damaged: ema.safetensors has 5 of" in capsys.readouterr().err
    with pytest.raises(DamagedCheckpointError, match=r"ema.safetensors has 5 of"):
        find_checkpoint(NEWEST)


def test_a_copy_lacks_the_optimizer_and_is_deleted(
    memory: fsspec.AbstractFileSystem, run: Path
) -> None:
    with local_copy(NEWEST, "ema") as copy:
        assert sorted(path.name for path in copy.iterdir()) == ["ema.safetensors", STATE]
        trained = load_trained_student(copy)
    assert not copy.parent.exists()
    with (
        pytest.raises(UserError, match=f"'{NEWEST}' is a folder that says what"),
        local_copy(NEWEST, "ema") as copy,
    ):
        load_trained_student(copy, model="SiT-S/2")
    assert not copy.parent.exists()
    assert trained.step == 4
    expected, _ = load_student(run)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, trained.student.state_dict()[name]), name


def test_a_worker_loads_the_same_from_both(memory: fsspec.AbstractFileSystem, run: Path) -> None:
    config = SampleConfig.model_validate({"autoencoder": "demo", "weights": "model"})
    threads = torch.get_num_threads()
    loaded = [
        SampleWorker().load(config, find_checkpoint(name), "cpu", threads)
        for name in (URL, str(run))
    ]
    assert loaded[0] == loaded[1]


def test_altered_weights_are_refused(memory: fsspec.AbstractFileSystem) -> None:
    path = "/drawn/run/checkpoint-000000004/ema.safetensors"
    data = bytearray(memory.cat_file(path))
    data[-1] ^= 1
    memory.pipe_file(path, bytes(data))
    expected = f"'{NEWEST}' is damaged: ema.safetensors was altered"
    with pytest.raises(DamagedCheckpointError, match=expected), local_copy(NEWEST, "ema"):
        pass


def test_a_checkpoint_that_was_removed_meanwhile(memory: fsspec.AbstractFileSystem) -> None:
    memory.rm("/drawn/run/checkpoint-000000004", recursive=True)
    with (
        pytest.raises(UserError, match=f"'{NEWEST}' does not exist any more, or is not visible"),
        local_copy(NEWEST, "ema"),
    ):
        pass


def test_a_file_of_weights(memory: fsspec.AbstractFileSystem, run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "checkpoint-000000004" / "optimizer.pt", tmp_path / "a.pt")
    memory.put_file(str(tmp_path / "a.pt"), "/drawn/a.pt")
    place = find_checkpoint("memory://drawn/a.pt")
    assert place == "memory://drawn/a.pt"
    with local_copy(place, "ema") as copy:
        assert copy.read_bytes() == (tmp_path / "a.pt").read_bytes()
    with (
        pytest.raises(UserError, match=f"'{place}' does not record its architecture"),
        local_copy(place, "ema") as copy,
    ):
        load_trained_student(copy)


def test_an_export_is_the_same_from_both(
    memory: fsspec.AbstractFileSystem, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy includes the optimizer and is deleted afterwards."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    for name, source in (("far.pt", URL), ("near.pt", str(run))):
        assert export(["--checkpoint", source, "--out", str(tmp_path / name)]) == 0
    assert not list(scratch.iterdir())
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("far.pt", "near.pt"))
    assert one["steps"] == 4
    assert one.keys() == other.keys()
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][key], other[part][key]) for key in other[part])
    for number, state in other["opt"]["state"].items():
        assert torch.equal(one["opt"]["state"][number]["exp_avg"], state["exp_avg"])
    memory.pipe_file(f"{NEWEST}/optimizer.pt", b"x" * memory.size(f"{NEWEST}/optimizer.pt"))
    with pytest.raises(UserError, match="checksum"):
        export(["--checkpoint", NEWEST, "--out", str(tmp_path / "bad.pt")])
    assert not (tmp_path / "bad.pt").exists()
