"""Damaged, unfinished and foreign checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from jobs.export import main as export
from jobs.train_haste import train_run
from pipeline.checkpoints.integrity import DamagedCheckpointError, verify, write_state
from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.remote import RemoteCheckpoints
from pipeline.checkpoints.selection import Checkpoints, latest_state, latest_valid
from pipeline.checkpoints.state import CheckpointContents, load_optimizer, read_state
from pipeline.checkpoints.store_identity import check_store_identity, store_identity
from pipeline.cli.config_files import merge
from pipeline.runs.directory import RunFolder
from pipeline.runs.metrics import read_metrics
from pipeline.store import Store
from pipeline.train.local import train_here
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.store import STORE_VERSION, Manifest, StoreIndex
from tests.stores import random_manifest, tiny_run

Make = Callable[..., RunConfig]


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class CopiedCheckpoint(CheckpointContents):
    """The files of another checkpoint, byte for byte."""

    def __init__(self, source: Path) -> None:
        super().__init__({}, {}, {})
        object.__setattr__(self, "source", source)

    def write(self, folder: Path) -> None:
        shutil.copytree(self.source, folder, dirs_exist_ok=True)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights cut short": ("model.safetensors", shorten, r"model\.safetensors has \d+ of \d+ bytes"),
    "weights gone": ("ema.safetensors", Path.unlink, r"ema\.safetensors is missing"),
    "optimizer cut short": ("optimizer.pt", shorten, r"optimizer\.pt has \d+ of \d+ bytes"),
    "one bit": ("optimizer.pt", flip, r"optimizer\.pt was altered"),
    "state gone": ("state.json", Path.unlink, r"state\.json is missing"),
    "state cut short": ("state.json", shorten, r"state\.json: "),
    "state empty": ("state.json", lambda path: path.write_bytes(b""), r"state\.json: "),
    "state of another kind": ("state.json", lambda path: path.write_text("[]"), r"state\.json: "),
    "state edited": (
        "state.json",
        lambda path: path.write_text(path.read_text().replace('"step": 4', '"step": 5')),
        r"state\.json: its checksum is wrong",
    ),
}


@pytest.fixture(params=DAMAGES)
def damage(request: pytest.FixtureRequest) -> tuple[str, Callable[[Path], None], str]:
    return DAMAGES[request.param]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, random_store: Store) -> Path:
    """Checkpoints of steps 2 and 4 of a run. Tests copy it before they change it."""
    config = RunConfig.model_validate(
        {**tiny_run(), "store": random_store.url, "steps": 4, "checkpoint": {"every": 2}}
    )
    folder = tmp_path_factory.mktemp("made") / "tiny"
    train_here(config, folder)
    return folder


@pytest.fixture
def run_folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "tiny")


def test_a_damaged_latest_checkpoint_is_named_and_the_one_before_is_used(
    run_config: Make,
    run_folder: Path,
    damage: tuple[str, Callable[[Path], None], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, spoil, complaint = damage
    spoil(run_folder / "checkpoint-000000004" / file)
    assert latest_checkpoint(run_folder) == run_folder / "checkpoint-000000002"
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(complaint, line), line
    assert "checkpoint-000000004" in line
    assert line.endswith("trying step 2")


def test_a_run_resumes_from_the_one_before_and_replaces_the_damaged_one(
    run_config: Make, run_folder: Path, made: Path
) -> None:
    shorten(run_folder / "checkpoint-000000004" / "ema.safetensors")
    train_here(run_config(steps=4, checkpoint={"every": 2, "keep": 1}), run_folder)
    assert [path.name for path in run_folder.glob("*checkpoint*")] == ["checkpoint-000000004"]
    again, before = (verify(path / "checkpoint-000000004") for path in (run_folder, made))
    for name in ("model.safetensors", "ema.safetensors", "projector_ema.safetensors"):
        assert again["files"][name] == before["files"][name]
    steps = [row["step"] for row in read_metrics(run_folder / "metrics.jsonl")]
    assert steps == [1, 2, 3, 3, 4]  # with the event before step 3


def test_a_run_without_a_valid_checkpoint_does_not_restart(
    run_config: Make, run_folder: Path
) -> None:
    for checkpoint in run_folder.glob("checkpoint-*"):
        shorten(checkpoint / "state.json")
    complaint = "holds 2 checkpoints and no valid one: restore one, or delete them"
    with pytest.raises(UserError, match=complaint):
        train_here(run_config(), run_folder)
    with pytest.raises(UserError, match=complaint):
        train_run(run_config(output=str(run_folder.parent)))
    with pytest.raises(UserError, match=complaint):
        export(["--checkpoint", str(run_folder), "--out", str(run_folder / "out.pt")])


def test_a_checkpoint_requested_by_name_is_not_replaced_by_another(run_folder: Path) -> None:
    shorten(run_folder / "checkpoint-000000004" / "state.json")
    with pytest.raises(UserError, match=r"checkpoint-000000004' is damaged: state\.json"):
        latest_checkpoint(run_folder / "checkpoint-000000004")
    shutil.rmtree(run_folder / "checkpoint-000000004")
    assert latest_checkpoint(run_folder / "checkpoint-000000004") is None


@pytest.mark.parametrize("spoil", [shorten, lambda path: path.write_bytes(b"")])
def test_a_truncated_optimizer_is_one_line(run_folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(run_folder / "checkpoint-000000004" / "optimizer.pt")
    with pytest.raises(UserError, match=r"damaged: optimizer\.pt") as error:
        load_optimizer(run_folder / "checkpoint-000000004")
    assert "\n" not in str(error.value)


def test_temporary_files_of_a_dead_process_are_removed(run_folder: Path) -> None:
    left = run_folder / ".tmp-left"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    LocalCheckpoints(run_folder, keep=2).save(6, CheckpointContents({}, {}, {"step": 6}))
    assert not left.exists()
    names = sorted(path.name for path in run_folder.glob("checkpoint-*"))
    assert names == ["checkpoint-000000004", "checkpoint-000000006"]


def test_a_checkpoint_of_a_later_version_is_named(run_folder: Path) -> None:
    folder = run_folder / "checkpoint-000000004"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").unlink()
    write_state(
        folder, {**{k: v for k, v in state.items() if k not in ("files", "sha256")}, "version": 99}
    )
    with pytest.raises(UserError, match="is of version 99, newer than this software knows"):
        read_state(folder)


# -- the store that it was trained on ------------------------------------------------------------

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "other images": ({"dataset": {"fingerprint": "5" * 64}}, "dataset.fingerprint"),
    "other shards": ({"shard_size": 11, "num_shards": 2}, "shard_size"),
    "other autoencoder": ({"autoencoder": {"weights_sha256": "5" * 64}}, "autoencoder.weights_sha"),
    "other scale": ({"autoencoder": {"scaling_factor": 0.7}}, "autoencoder.scaling_factor"),
    "other statistics": (
        {"autoencoder": {"latents_mean": (0.5,) * 4, "latents_std": (2.0,) * 4}},
        "autoencoder.latents_mean",
    ),
    "other latents": (
        {"streams": {"latents": {"columns": {"mean": {"codec": "float32"}}}}},
        "latents.columns",
    ),
    "other teacher": (
        {"streams": {"maps": {"teacher": {"weights_sha256": "5" * 64}}}},
        "teacher.weights_sha256",
    ),
    "other input": (
        {"streams": {"maps": {"teacher": {"mean": (0.5,) * 3, "statistics_of": "options"}}}},
        "teacher.mean",
    ),
    "other codec": (
        {"streams": {"maps": {"columns": {"features": {"codec": "float32"}}}}},
        "teacher.columns",
    ),
    "other levels of a layer": (
        {
            "streams": {
                "maps": {"columns": {"attention": {"codec": "sqrt510", "levels": (9, 510, 510)}}}
            }
        },
        "teacher.columns",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_store_that_changed_during_the_run_is_refused(
    run_config: Make, random_store: Store, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    counts = StoreIndex(version=STORE_VERSION, samples_per_shard=[6, 6, 6, 4], bytes_per_stream={})
    monkeypatch.setattr(Store, "index", lambda self: counts)
    overrides, name = CHANGES[change]
    manifest = random_manifest(22, 6)
    changed = Manifest.model_validate(merge(manifest.model_dump(), overrides))
    alignment = run_config().alignment
    saved, now = (
        store_identity(Store("memory://identity", which), alignment)
        for which in (manifest, changed)
    )
    saved = json.loads(json.dumps(saved))
    check_store_identity(saved, saved, aligned=True, where="c")
    with pytest.raises(UserError, match=f"checkpoint 'c' was trained on another store: its {name}"):
        check_store_identity(saved, now, aligned=True, where="c")
    if name.startswith("teacher."):  # it is not read any more
        check_store_identity(saved, now, aligned=False, where="c")


def test_a_changed_store_is_refused_when_a_run_resumes(
    run_config: Make, run_folder: Path, tmp_path: Path, random_store: Store
) -> None:
    url = str(tmp_path / "changed")
    shutil.copytree(random_store.root, url)
    manifest = json.loads(Path(url, "manifest.json").read_text())
    manifest["autoencoder"]["scaling_factor"] = 0.25
    Path(url, "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=r"its autoencoder\.scaling_factor was 0\.5, now it is 0\.25"
    ):
        train_here(run_config(store=url), run_folder)


# -- object stores -------------------------------------------------------------------------------


@pytest.fixture
def remote(run_folder: Path) -> RemoteCheckpoints:
    """The same checkpoints at a URL."""
    filesystem = fsspec.filesystem("memory")
    root = f"/{run_folder.parent.name}/tiny"
    filesystem.put(str(run_folder), root, recursive=True)
    return RemoteCheckpoints(filesystem, root, f"memory:/{root}", keep=2)


def test_remote_checkpoints_are_selected_like_local_ones(
    remote: RemoteCheckpoints,
    tmp_path: Path,
    damage: tuple[str, Callable[[Path], None], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoints: Checkpoints = remote
    assert latest_valid(checkpoints, tmp_path / "a") == (
        4,
        tmp_path / "a" / "checkpoint-000000004",
    )
    state = latest_state(checkpoints)
    assert state is not None
    assert state.step == 4
    file, spoil, _ = damage
    copy = tmp_path / "a" / "checkpoint-000000004" / file
    spoil(copy)
    path = f"{remote.root}/checkpoint-000000004/{file}"
    remote.filesystem.rm_file(path)
    if copy.exists():
        remote.filesystem.put_file(str(copy), path)
    found = latest_valid(checkpoints, tmp_path / "b")
    assert found is not None
    assert found[0] == 2
    assert read_state(found[1]).step == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "memory://" in line or "checkpoint-000000004" in line


def test_an_interrupted_upload_is_not_a_checkpoint(
    remote: RemoteCheckpoints, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    from pipeline.checkpoints import remote as module

    sent: list[str] = []
    publish = module.publish

    def die_before_the_state(filesystem: Any, local: Path, path: str) -> None:
        if local.name == "state.json":
            raise KilledError
        sent.append(local.name)
        publish(filesystem, local, path)

    contents = CopiedCheckpoint(made / "checkpoint-000000004")

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", die_before_the_state)
        with pytest.raises(KilledError):
            remote.save(6, contents)
    assert "optimizer.pt" in sent
    assert remote.steps() == [2, 4, 6]
    found = latest_valid(remote, tmp_path / "c")
    assert found is not None
    assert found[0] == 4
    remote.save(6, contents)
    assert remote.steps() == [4, 6]
    remote.save(4, contents)  # the run resumed from an earlier one, so 6 is discarded
    assert remote.steps() == [4]


def test_an_interrupted_first_upload_does_not_prevent_a_start(
    remote: RemoteCheckpoints, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker is killed while it writes its run's first checkpoint, so there is none to resume."""
    remote.filesystem.rm(f"{remote.root}/checkpoint-000000002", recursive=True)
    remote.filesystem.rm_file(f"{remote.root}/checkpoint-000000004/state.json")
    assert latest_state(remote) is None
    assert latest_valid(remote, tmp_path / "d") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint-000000004' is damaged: state.json, which is uploaded last" in line

    contents = CopiedCheckpoint(made / "checkpoint-000000002")

    remote.save(2, contents)
    assert remote.steps() == [2]


def test_unfinished_checkpoints_do_not_count_as_kept(remote: RemoteCheckpoints, made: Path) -> None:
    remote.filesystem.rm_file(f"{remote.root}/checkpoint-000000004/state.json")

    contents = CopiedCheckpoint(made / "checkpoint-000000004")

    remote.save(6, contents)
    assert remote.steps() == [2, 6]


def test_an_output_that_is_not_shared_is_refused(run_config: Make, run_folder: Path) -> None:
    RunFolder(run_config(output=str(run_folder.parent))).require_shared()
    with pytest.raises(UserError, match=r"does not see .*: --output must be a folder that all"):
        RunFolder(run_config(output="/only/on/the/head")).require_shared()


def test_a_run_folder_lists_its_checkpoints(run_config: Make, run_folder: Path) -> None:
    run = RunFolder(run_config(output=str(run_folder.parent)))
    assert run.checkpoints.steps() == [2, 4]
    state = latest_state(run.checkpoints)
    assert state is not None
    assert state.step == 4
    with pytest.raises(DamagedCheckpointError):
        run.checkpoints.state(7)
