"""Checkpoints that several workers write, each a share: read as those of one worker."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from torch import Tensor

from jobs.export import main as export
from pipeline.checkpoints import local, shares, state
from pipeline.checkpoints.background import HostMemory
from pipeline.checkpoints.division import part_of
from pipeline.checkpoints.integrity import (
    DamagedCheckpointError,
    verify,
    write_listed_state,
)
from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.remote import RemoteCheckpoints
from pipeline.checkpoints.resolve import find_checkpoint, local_copy
from pipeline.checkpoints.selection import Checkpoints, latest_valid
from pipeline.checkpoints.shares import Piece, divide, share_count
from pipeline.checkpoints.state import (
    CheckpointContents,
    load_optimizer,
    read_state,
    read_weights,
    verify_finite,
)
from pipeline.checkpoints.student import load_student
from pipeline.distributed.process_group import ProcessGroup
from pipeline.hashing import sha256_of_module
from pipeline.runs.provenance import check_samples_are_of
from pipeline.storage.files import StorageError
from pipeline.store import Store
from pipeline.train.local import train_here
from pipeline.train.ray_trainer import _Saver
from schemas.errors import UserError
from schemas.run import RunConfig
from tests.pipeline.checkpoints.test_background import contents_of, written
from tests.pipeline.train.test_loop import assert_same_weights, losses
from tests.processes import divides, train_on
from tests.stores import tiny_run

Make = Callable[..., RunConfig]
NAME = "checkpoint-000000004"
TENSORS = ("model", "ema", "projector", "projector_ema")


@pytest.fixture(autouse=True)
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "MIN_BYTES", 1)
    monkeypatch.setattr(shares, "LIMIT_SECONDS", 60.0)
    for module in (shares, local):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.01)


def group_of(rank: int, world_size: int, token: int) -> Any:
    """One of the workers, all of which draw ``token``."""
    return SimpleNamespace(
        rank=rank, world_size=world_size, is_main=rank == 0, broadcast_int=lambda _: token
    )


def parts_of(
    contents: CheckpointContents, world_size: int, token: int = 7
) -> list[CheckpointContents]:
    return [part_of(contents, group_of(rank, world_size, token)) for rank in range(world_size)]


def save_all(
    checkpoints: Checkpoints, step: int, parts: list[CheckpointContents]
) -> dict[int, Exception]:
    """All workers save at once, in threads. Errors by rank."""
    errors: dict[int, Exception] = {}

    def save(rank: int, part: CheckpointContents) -> None:
        try:
            checkpoints.save(step, part)
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=save, args=one) for one in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return errors


def tensors_of(folder: Path, names: tuple[str, ...] = ("model", "ema")) -> dict[str, Tensor]:
    """Weights and moments."""
    found = {f"{n}.{key}": t for n in names for key, t in read_weights(folder, n).items()}
    for number, one in load_optimizer(folder)["state"].items():
        found |= {f"{number}.{key}": value for key, value in one.items()}
    return found


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class Place:
    """Checkpoints of a run, and the files that are left there."""

    def __init__(self, checkpoints: Checkpoints, files: Callable[[], list[str]]) -> None:
        self.checkpoints = checkpoints
        self.files = files


def place_of(kind: str, tmp_path: Path, keep: int = 9) -> Place:
    if kind == "local":
        folder = tmp_path / "run"
        return Place(LocalCheckpoints(folder, keep), lambda: files_below(folder))
    filesystem = fsspec.filesystem("memory")
    root = f"/shares-{tmp_path.name}"

    def files() -> list[str]:
        return sorted(str(path).removeprefix(f"{root}/") for path in filesystem.find(root))

    return Place(RemoteCheckpoints(filesystem, root, f"memory:/{root}", keep), files)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    found = place_of(request.param, tmp_path)
    yield found
    if isinstance(found.checkpoints, RemoteCheckpoints) and found.files():
        found.checkpoints.filesystem.rm(found.checkpoints.root, recursive=True)


# -- the division --------------------------------------------------------------------------------


def test_the_number_of_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "MIN_BYTES", 100)
    expected = {(0, 4): 1, (199, 4): 1, (200, 4): 2, (10_000, 4): 4, (10_000, 1): 1, (350, 64): 3}
    assert {key: share_count(*key) for key in expected} == expected


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_equal_but_for_one_piece_whatever_the_order(count: int) -> None:
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 50, (60,), generator=draw).tolist()
    sizes: dict[Piece, int] = {("model", str(n)): size for n, size in enumerate(drawn)}
    sizes |= {("optimizer.pt", n): 2 * size for n, size in enumerate(drawn)}
    owners = divide(sizes, count)
    assert owners == divide(dict(reversed(sizes.items())), count)
    assert owners.keys() == sizes.keys()
    loads = [sum(sizes[p] for p, owner in owners.items() if owner == n) for n in range(count)]
    assert max(loads) - min(loads) <= min(size for size in sizes.values() if size) + 1


def test_a_small_state_is_the_main_ranks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = contents_of()
    expected = written(contents, tmp_path / "expected")
    assert part_of(contents, ProcessGroup()) is contents  # one worker, however large the state
    monkeypatch.setattr(shares, "MIN_BYTES", 1 << 20)
    main, *others = parts_of(contents, 3)
    assert main.share is None
    assert written(main, tmp_path / "main") == expected
    for part in others:
        assert part.share is None
        assert not part.weights
        assert not part.optimizer["state"]
    assert json.loads(expected["state.json"])["version"] == 2
    assert "shares" not in json.loads(expected["state.json"])


def test_fewer_shares_than_workers_are_spread_over_the_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contents = CheckpointContents({"model": {str(n): torch.ones(10) for n in range(40)}}, {}, {})
    monkeypatch.setattr(shares, "MIN_BYTES", 400)
    numbers = [None if part.share is None else part.share.number for part in parts_of(contents, 8)]
    assert numbers == [0, None, 1, None, 2, None, 3, None]


def test_a_worker_copies_its_share_alone() -> None:
    weights = {"model": {str(n): torch.randn(1000) for n in range(30)}}
    parts = parts_of(CheckpointContents(weights, {}, {}), 3)
    for part in parts:
        memory = HostMemory(torch.device("cpu"))
        held = memory.copy(part)
        assert held is not None
        assert held[0].share == part.share
        assert 40_000 <= memory.nbytes < 80_000  # of 120,000


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_shares_hold_what_one_worker_writes(place: Place, tmp_path: Path, world_size: int) -> None:
    contents = contents_of(4)
    written(contents, tmp_path / "expected")
    assert not save_all(place.checkpoints, 4, parts_of(contents, world_size))
    found = latest_valid(place.checkpoints, tmp_path, verify_finite)
    assert found is not None
    folder = found[1]
    saved = verify(folder)
    assert set(place.files()) == {f"{NAME}/{file}" for file in (*saved["files"], "state.json")}
    assert len(saved["shares"]["optimizer.pt"]) == world_size
    assert not set(saved["shares"]) & set(saved["files"])
    assert_same_weights(tensors_of(folder), tensors_of(tmp_path / "expected"))
    optimizer, expected = load_optimizer(folder), load_optimizer(tmp_path / "expected")
    assert optimizer["param_groups"] == expected["param_groups"]
    assert list(optimizer["state"]) == list(expected["state"])
    alone = verify(tmp_path / "expected")
    assert (saved.pop("version"), alone.pop("version")) == (3, 2)
    for one in (saved, alone):
        del one["files"]
    del saved["shares"]
    assert saved == alone


def test_earlier_software_says_that_it_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(LocalCheckpoints(tmp_path, 1), 4, parts_of(contents_of(), 2))
    monkeypatch.setattr(state, "VERSION", 2)
    with pytest.raises(UserError, match="is of version 3, newer than this software knows"):
        read_state(tmp_path / NAME)


def test_older_checkpoints_go_with_all_their_shares(tmp_path: Path) -> None:
    for kind in ("local", "memory"):
        place = place_of(kind, tmp_path, keep=1)
        for step in (2, 4):
            assert not save_all(place.checkpoints, step, parts_of(contents_of(step), 3, step))
        assert {file.split("/")[0] for file in place.files()} == {NAME}
        place.checkpoints.save(6, contents_of(6))
        assert {file.split("/")[0] for file in place.files()} == {"checkpoint-000000006"}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "was altered"),
        (lambda path: os.truncate(path, 9), "has 9 of"),
        (Path.unlink, "is missing"),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_or_missing_share_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path,
    file: str,
    spoil: Callable[[Path], None],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoints = LocalCheckpoints(tmp_path, 2)
    for step in (2, 4):
        save_all(checkpoints, step, parts_of(contents_of(step), 3))
    part = verify(tmp_path / NAME)["shares"][file][-1]
    spoil(tmp_path / NAME / part)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-000000002"
    assert f"{part} {complaint}" in capsys.readouterr().err
    if complaint == "is missing":
        with pytest.raises(UserError, match=f"lacks {part}"):
            tensors_of(tmp_path / NAME)


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts["optimizer.pt"].pop(),
        lambda parts: parts.pop("ema.safetensors"),
        lambda parts: parts["ema.safetensors"].append("../model.safetensors"),
        lambda parts: parts["ema.safetensors"].append(5),
    ],
)
def test_a_state_that_does_not_name_each_part_is_damaged(
    tmp_path: Path, change: Callable[[dict[str, list[Any]]], object]
) -> None:
    """Its checksum is right: readers would leave tensors out, or leave the folder."""
    save_all(LocalCheckpoints(tmp_path, 2), 4, parts_of(contents_of(), 2))
    values = verify(tmp_path / NAME)
    change(values["shares"])
    write_listed_state(tmp_path / NAME, values, values["files"])
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: state\.json"):
        verify(tmp_path / NAME)


def test_a_share_that_is_not_finite_is_not_continued(tmp_path: Path) -> None:
    contents = contents_of()
    contents.weights["ema"]["b.weight"][0, 0] = float("nan")
    save_all(LocalCheckpoints(tmp_path, 2), 4, parts_of(contents, 3))
    with pytest.raises(DamagedCheckpointError, match=r"b.weight of ema-.* not finite"):
        verify_finite(tmp_path / NAME)


# -- failures ------------------------------------------------------------------------------------


class Failing(CheckpointContents):
    """A worker whose disk is full after its first file."""

    def write_share(self, folder: Path) -> dict[str, dict[str, Any]]:
        super().write_share(folder)
        raise OSError(28, "No space left on device")


def failing(part: CheckpointContents) -> CheckpointContents:
    return Failing(part.weights, part.optimizer, part.state, part.share)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_worker_that_fails_leaves_no_checkpoint(place: Place, tmp_path: Path, rank: int) -> None:
    assert not save_all(place.checkpoints, 2, parts_of(contents_of(2), 3, 1))
    before = place.files()
    parts = parts_of(contents_of(4), 3, 2)
    parts[rank] = failing(parts[rank])
    errors = save_all(place.checkpoints, 4, parts)
    assert isinstance(errors[rank], OSError)
    if rank:
        assert isinstance(errors[0], StorageError)  # which a restart may mend
        assert f"share {rank + 1} of 3 failed: [Errno 28] No space left" in str(errors[0])
    found = latest_valid(place.checkpoints, tmp_path)
    assert found is not None
    assert found[0] == 2
    # the run goes on from step 2 on two workers, and comes to the same step
    assert not save_all(place.checkpoints, 4, parts_of(contents_of(4), 2, 3))
    files = set(verify(place.checkpoints.fetch(4, tmp_path / "4"))["files"]) | {"state.json"}
    assert set(place.files()) == set(before) | {f"{NAME}/{file}" for file in files}


def test_a_worker_that_died_is_waited_for_within_a_limit(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "LIMIT_SECONDS", 1.0)
    parts = parts_of(contents_of(4), 3, 1)
    (error,) = save_all(place.checkpoints, 4, parts[:2]).values()
    assert isinstance(error, StorageError)
    assert "is not published: share 3 of 3 was not written within 1 s" in str(error)
    assert latest_valid(place.checkpoints, tmp_path) is None
    place.checkpoints.save(4, contents_of(4))  # the run begins again on one worker
    assert set(place.files()) == {
        f"{NAME}/{file}"
        for file in ("ema.safetensors", "model.safetensors", "optimizer.pt", "state.json")
    }


def test_a_worker_that_outlives_its_run_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "FOLDER_SECONDS", 0.1)
    (tmp_path / "run").mkdir()
    with pytest.raises(StorageError, match="must be a folder that all nodes share"):
        LocalCheckpoints(tmp_path / "run", 1).save(4, parts_of(contents_of(), 2)[1])
    assert not list((tmp_path / "run").iterdir())


def test_files_of_an_earlier_attempt_are_never_published(tmp_path: Path) -> None:
    """A worker of it finishes its upload while the next one is under way, or later."""
    place = place_of("memory", tmp_path)
    late = parts_of(contents_of(1), 2, 1)[1]
    place.checkpoints.save(4, late)
    assert not save_all(place.checkpoints, 4, parts_of(contents_of(2), 2, 2))
    files = place.files()
    place.checkpoints.save(4, late)
    folder = place.checkpoints.fetch(4, tmp_path)
    listed = set(verify(folder)["files"])
    assert set(files) == {f"{NAME}/{file}" for file in (*listed, "state.json")}
    written(contents_of(2), tmp_path / "expected")
    assert_same_weights(tensors_of(folder), tensors_of(tmp_path / "expected"))


def test_a_share_that_is_uploaded_first_stays(tmp_path: Path) -> None:
    """The main rank removes what earlier attempts left at this step, and nothing else."""
    place = place_of("memory", tmp_path)
    assert isinstance(place.checkpoints, RemoteCheckpoints)
    left = f"{place.checkpoints.root}/{NAME}/optimizer.pt"
    place.checkpoints.filesystem.pipe_file(left, b"half")
    main, other = parts_of(contents_of(4), 2)
    place.checkpoints.save(4, other)
    place.checkpoints.save(4, main)
    listed = verify(place.checkpoints.fetch(4, tmp_path))["files"]
    assert set(place.files()) == {f"{NAME}/{file}" for file in (*listed, "state.json")}


def test_workers_that_hold_other_tensors_are_found(place: Place, tmp_path: Path) -> None:
    other = contents_of(4)
    del other.optimizer["state"][1]
    parts = [parts_of(contents_of(4), 2)[0], parts_of(other, 2)[1]]
    (error,) = save_all(place.checkpoints, 4, parts).values()
    assert "share 2 of 2 is of a worker that holds other tensors" in str(error)
    assert latest_valid(place.checkpoints, tmp_path) is None


def test_a_share_that_lost_bytes_is_not_published(place: Place, tmp_path: Path) -> None:
    """The storage has less than the worker wrote."""

    class Short(CheckpointContents):
        def write_share(self, folder: Path) -> dict[str, dict[str, Any]]:
            found = super().write_share(folder)
            os.truncate(folder / max(found), 3)
            return found

    parts = parts_of(contents_of(4), 2)
    parts[1] = Short(parts[1].weights, parts[1].optimizer, parts[1].state, parts[1].share)
    (error,) = save_all(place.checkpoints, 4, parts).values()
    assert isinstance(error, StorageError)
    assert "has 3 of" in str(error)
    assert latest_valid(place.checkpoints, tmp_path) is None


# -- readers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(random_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of step 4, of one worker."""
    config = RunConfig.model_validate({**tiny_run(), "steps": 4, "store": random_store.url})
    folder = tmp_path_factory.mktemp("run") / "alone"
    train_here(config, folder)
    return folder


def divided(checkpoint: Path, checkpoints: Checkpoints, world_size: int) -> None:
    """The same state as ``world_size`` workers save it."""
    values = verify(checkpoint)
    step = values["step"]
    for key in ("files", "version"):
        del values[key]
    weights = {name: read_weights(checkpoint, name) for name in TENSORS}
    contents = CheckpointContents(weights, load_optimizer(checkpoint), values)
    assert not save_all(checkpoints, step, parts_of(contents, world_size))


def test_every_reader_finds_the_same(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "divided"
    divided(made / NAME, LocalCheckpoints(folder, 1), 3)
    assert not list((folder / NAME).glob("ema.safetensors"))
    assert_same_weights(tensors_of(folder / NAME, TENSORS), tensors_of(made / NAME, TENSORS))
    assert read_state(folder / NAME) == read_state(made / NAME)
    for weights in ("model", "ema"):
        (got, _), (expected, _) = (load_student(one, weights) for one in (folder, made))
        assert_same_weights(got.state_dict(), expected.state_dict())
    exported = []
    for one in (folder, made):
        export(["--checkpoint", str(one), "--out", str(tmp_path / f"{one.name}.pt")])
        exported.append(torch.load(tmp_path / f"{one.name}.pt", weights_only=True))
    assert_same_tree(*exported)
    info: Any = SimpleNamespace(
        weights="ema", checkpoint="/elsewhere/run/x", weights_sha256=sha256_of_module(expected)
    )
    check_samples_are_of(str(folder), info, 4)
    info.weights_sha256 = "0" * 64
    with pytest.raises(UserError, match="were not drawn from the 'ema' weights"):
        check_samples_are_of(str(folder), info, 4)


def assert_same_tree(got: Any, expected: Any) -> None:
    if isinstance(expected, Mapping):
        assert list(got) == list(expected)
        for key, value in expected.items():
            assert_same_tree(got[key], value)
    elif isinstance(expected, Tensor):
        assert torch.equal(got, expected)
    else:
        assert got == expected


def test_a_copy_of_a_url_has_the_parts_of_the_weights_alone(made: Path, tmp_path: Path) -> None:
    place = place_of("memory", tmp_path)
    assert isinstance(place.checkpoints, RemoteCheckpoints)
    divided(made / NAME, place.checkpoints, 2)
    url = f"memory:/{place.checkpoints.root}"
    with local_copy(find_checkpoint(url), "ema") as copy:
        assert sorted(path.name[:3] for path in copy.iterdir()) == ["ema", "ema", "sta"]
        got, _ = load_student(copy)
    assert_same_weights(got.state_dict(), load_student(made)[0].state_dict())
    filesystem, root = place.checkpoints.filesystem, place.checkpoints.root
    (part,) = filesystem.glob(f"{root}/{NAME}/ema-2-of-2-*")
    data = bytearray(filesystem.cat_file(part))
    data[-1] ^= 1
    filesystem.pipe_file(part, bytes(data))
    with pytest.raises(DamagedCheckpointError, match=r"ema-2-of-2-.* was altered"):
        local_copy(find_checkpoint(url), "ema").__enter__()
    filesystem.rm_file(part)
    with pytest.raises(DamagedCheckpointError, match=r"ema-2-of-2-.* is missing"):
        find_checkpoint(f"{url}/{NAME}")
    filesystem.rm(root, recursive=True)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_worker_of_ray_saves_its_share(rank: int) -> None:
    """The main rank alone answers requests, when all is published."""
    events: list[Any] = []
    run: Any = SimpleNamespace(
        checkpoints=SimpleNamespace(save=lambda step, part: events.append(part.share.number))
    )
    poller: Any = SimpleNamespace(saved=lambda number: events.append("served"))
    save = _Saver(run, poller if rank == 0 else None)
    save(4, parts_of(contents_of(), 3)[rank])
    assert events == ([0, "served"] if rank == 0 else [rank])
    if rank:
        save(4, CheckpointContents({}, {}, {}))
        assert events == [rank]


# -- trainings -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("shard", "first", "then"),
    [
        ("none", 3, 1),
        pytest.param("none", 3, 2, marks=pytest.mark.slow),
        pytest.param("fsdp2", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_trainings_resume_from_both_to_the_same_bits(
    run_config: Make, tmp_path: Path, shard: str, first: int, then: int
) -> None:
    """``first`` workers stop in Phase I, ``then`` go on beyond the termination."""
    config = run_config(
        global_batch=6, checkpoint={"every": 2}, compute={"shard": shard}, log_every=1
    )
    folders = {tmp_path / "divided": divides, tmp_path / "whole": None}
    found = []
    for folder, around in folders.items():
        train_on(first, config, folder, stop_at=2, around=around)
        latest = latest_checkpoint(folder)
        assert latest is not None
        found.append(tensors_of(latest, TENSORS))
        parts = verify(latest).get("shares", {}).get("optimizer.pt", [])
        assert len(parts) == (first if folder.name == "divided" else 0)
    assert_same_weights(*found)
    for folder, around in folders.items():
        train_on(then, config, folder, around=around)
        assert not [path for path in folder.glob(".tmp-*") if path.is_dir()]
    one, other = folders
    assert losses(one) == losses(other)
    assert_same_weights(*(tensors_of(end / "checkpoint-000000006", TENSORS) for end in folders))
