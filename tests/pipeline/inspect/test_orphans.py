"""`--gc` removes orphans of crashes, but no files of other names and none still being written."""

from __future__ import annotations

import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.inspect import orphans
from pipeline.inspect.__main__ import main
from pipeline.inspect.orphans import find_orphans, remove_orphans
from pipeline.inspect.verify import verify_store
from pipeline.store import ShardWriter, Store
from tests.helpers import all_files, known_values, write_known_shard
from tests.stores import add_random_stream, make_random_store

Capture = pytest.CaptureFixture[str]

ORPHANS = {
    ".tmp-0a": "temporary file of an interrupted writer",
    "commits/.tmp-0b": "temporary file of an interrupted writer",
    "maps/.tmp-0c": "temporary file of an interrupted writer",
    "maps/features/c/.tmp-0d": "temporary file of an interrupted writer",
    "maps/shard-000004.tar": "the store has only 4 shards",
    "commits/shard-000123.json": "the store has only 4 shards",
    "commits/gone/shard-000000.json": "the manifest has no stream 'gone'",
    "gone/shard-000000.tar": "the manifest has no stream 'gone'",
    "gone/.tmp-0e": "temporary file of an interrupted writer",
    "old_teacher_tail.safetensors": "the manifest has no stream 'old'",
    "old/features/c/0/0/0": "the manifest has no stream 'old'",
    "old/features.step/zarr.json": "the manifest has no stream 'old'",
    "maps_teacher_tail.safetensors": "the manifest does not name it",
    "commits/maps/shard-000001.json": "not listed in a commit record",
    "maps/features/c/1/0/0": "not listed in a commit record",
}
"""In a store of tars that nothing was added to."""

STRANGE = (
    "notes.txt",
    "README.md",
    "zarr.json",
    "maps/notes.txt",
    "maps/shard-1.tar",
    "maps/shard-000001.tar.bak",
    "commits/notes.txt",
    "mine/shard-000000.tar",
    "mine/.tmp-0f",
    "mine/deeper/manifest.json",
    "Weights_teacher_tail.safetensors",
)


def litter(root: Path, paths: Any, *, hours: float = 2.0) -> None:
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"12345")
        age(file, hours)


def age(path: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))


def test_a_sound_store_has_no_garbage(tmp_path: Path) -> None:
    for format in ("webdataset", "zarr"):
        store = make_random_store(tmp_path / format, samples=5, shard_size=2, format=format)
        assert find_orphans(store) == orphans.Orphans([], [])
        assert find_orphans(add_random_stream(store, "late")) == orphans.Orphans([], [])


def test_garbage_is_removed_and_nothing_else(known_store: Store, capsys: Capture) -> None:
    root = Path(known_store.root)
    before = all_files(root)
    litter(root, STRANGE)
    kept = all_files(root)
    litter(root, ORPHANS)
    assert main([known_store.url]) == 0
    assert f"orphans      {len(ORPHANS)} files, {5 * len(ORPHANS)} B" in capsys.readouterr().out
    assert main([known_store.url, "--gc"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"{known_store.url}: removed {len(ORPHANS)} files, 75 B\n")
    for path, reason in ORPHANS.items():
        assert f"5 B  {path}: {reason}\n" in page
    for path in STRANGE:
        assert f"unknown       5 B  {path}: not a file of the store; not removed" in page
    assert all_files(root) == kept
    assert kept.items() >= before.items()
    assert verify_store(Store.open(known_store.url)).damaged == []
    assert main([known_store.url]) == 0
    assert "  orphans  " not in capsys.readouterr().out


def test_json_lists_what_became_of_everything(known_store: Store, capsys: Capture) -> None:
    root = Path(known_store.root)
    litter(root, ["maps/.tmp-old", "notes.txt"])
    litter(root, ["maps/.tmp-new"], hours=0.5)
    assert main([known_store.url, "--gc", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["removed"] == [
        {"path": "maps/.tmp-old", "bytes": 5, "reason": "temporary file of an interrupted writer"}
    ]
    assert [file["path"] for file in found["kept"]] == ["maps/.tmp-new"]
    assert "only 30 min old" in found["kept"][0]["reason"]
    assert [file["path"] for file in found["unknown"]] == ["notes.txt"]


def test_a_running_extraction_is_left_alone(known_store: Store, capsys: Capture) -> None:
    root = Path(known_store.root)
    (root / "commits" / "shard-000001.json").unlink()  # published, its record not yet written
    (root / "index.json").unlink()
    age(root / "latents" / "shard-000001.tar", 0.9)
    with ShardWriter(known_store.url, known_store.manifest, 3) as writer:
        writer.add("a", known_values(3, 0))
        before = all_files(root)
        assert main([known_store.url, "--gc"]) == 0
        assert all_files(root) == before
    assert "kept 4 files" in (page := capsys.readouterr().out)
    assert "younger than 1 h" in page
    assert main([known_store.url, "--gc", "--gc-age", "0"]) == 0
    assert not (root / "latents" / "shard-000001.tar").exists()
    store = Store.open(known_store.url)
    write_known_shard(store.url, store.manifest, 1, 3)
    store.finish()
    assert verify_store(store).damaged == []


def test_age_counts_from_the_last_change_before_the_removal(
    known_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(known_store.root)
    (root / "commits" / "shard-000001.json").unlink()
    for stream in ("latents", "maps"):
        age(root / stream / "shard-000001.tar", 48)
    listed = orphans.find_orphans

    def then_an_extraction_commits_it(store: Store) -> orphans.Orphans:
        leftovers = listed(store)
        write_known_shard(store.url, store.manifest, 1, 3)
        return leftovers

    monkeypatch.setattr(orphans, "find_orphans", then_an_extraction_commits_it)
    assert remove_orphans(known_store, hours=1).removed == []
    assert verify_store(Store.open(known_store.url)).damaged == []


def test_links_are_neither_followed_nor_removed(known_store: Store, tmp_path: Path) -> None:
    root = Path(known_store.root)
    outside = tmp_path / "outside"
    litter(outside, [".tmp-0a", "shard-000009.tar"])
    (root / "maps" / "more").symlink_to(outside)
    (root / "maps" / "shard-000009.tar").symlink_to(outside / "shard-000009.tar")
    (root / ".tmp-link").symlink_to(outside / ".tmp-0a")
    (root / "maps" / ".tmp-broken").symlink_to(outside / "nothing")
    before = all_files(tmp_path)
    done = remove_orphans(known_store, hours=0)
    assert done.removed == []
    assert {file.path for file in done.unknown} == {
        "maps/more/.tmp-0a",
        "maps/more/shard-000009.tar",
        "maps/shard-000009.tar",
        ".tmp-link",
    }
    assert {file.reason for file in done.unknown} == {"a link or in a linked folder; not removed"}
    assert all_files(tmp_path) == before


def test_a_store_behind_a_link_is_a_store(known_store: Store, tmp_path: Path) -> None:
    litter(Path(known_store.root), ["maps/.tmp-0"])
    (tmp_path / "link").symlink_to(known_store.root)
    done = remove_orphans(Store.open(str(tmp_path / "link")), hours=1)
    assert [file.path for file in done.removed] == ["maps/.tmp-0"]
    assert done.unknown == []


def test_other_filesystems_are_cleaned_by_their_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers import write_known_store

    store = write_known_store("memory://gc-test/store")
    store.filesystem.pipe_file(f"{store.root}/maps/.tmp-0", b"12345")
    assert len(remove_orphans(store, hours=1).kept) == 1
    now = datetime.datetime.now(datetime.UTC)
    for written in (now - datetime.timedelta(hours=2), None):
        monkeypatch.setattr(
            fsspec.get_filesystem_class("memory"), "modified", lambda *_, t=written: t
        )
        done = remove_orphans(store, hours=1)
        assert [len(done.removed), len(done.kept)] == ([0, 0] if written is None else [1, 0])


def test_a_file_of_unknown_age_is_kept(known_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    litter(Path(known_store.root), ["maps/.tmp-0"])

    def untold(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(type(known_store.filesystem), "modified", untold)
    (file,) = remove_orphans(known_store, hours=0).kept
    assert file.reason.endswith("its age is unknown")


def test_a_large_store_is_not_listed_for_a_page(
    known_store: Store, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    litter(Path(known_store.root), ["maps/.tmp-0"])
    monkeypatch.setattr(orphans, "MAX_LISTED_FILES", 3)
    assert main([known_store.url]) == 0
    assert "  orphans  " not in capsys.readouterr().out


def test_nothing_is_removed_where_there_is_no_manifest(tmp_path: Path) -> None:
    litter(tmp_path, ["maps/.tmp-0"])
    with pytest.raises(Exception, match="holds no store"):
        main([str(tmp_path), "--gc"])
    assert (tmp_path / "maps" / ".tmp-0").exists()
