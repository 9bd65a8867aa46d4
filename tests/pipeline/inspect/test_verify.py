"""`--verify`: every flipped byte is found and named, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline.inspect import file_check
from pipeline.inspect.__main__ import main
from pipeline.inspect.file_check import Damage
from pipeline.inspect.verify import Verification, verify_store
from pipeline.store import Store
from schemas.store import CommitRecord, Manifest, StreamFile
from tests.helpers import SIZES, edit_json, known_key, write_known_shard
from tests.stores import add_random_stream, make_random_store, random_manifest

Capture = pytest.CaptureFixture[str]


def verify(url: str) -> Verification:
    return verify_store(Store.open(url), threads=3)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture(params=["webdataset", "zarr"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    """Random numbers in both formats, with a stream that came later."""
    store = make_random_store(tmp_path / "store", samples=7, shard_size=3, format=request.param)
    return add_random_stream(store, "late")


def files_of(store: Store) -> list[tuple[CommitRecord, str, StreamFile]]:
    records = [store.record(n, s) for s in ("latents", "late") for n in range(3)]
    return [(r, name, file) for r in records for name, files in r.streams.items() for file in files]


def test_a_sound_store_is_read_once_and_found_sound(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int]] = []
    original = file_check.read_ranges

    def record(filesystem: Any, path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        asked.extend((path, begin, end) for begin, end in ranges)
        return original(filesystem, path, ranges)

    monkeypatch.setattr(file_check, "read_ranges", record)
    found = verify(store.url)
    assert found.damaged == []
    listed = [(f"{store.root}/{file.file}", 0, file.bytes) for _, _, file in files_of(store)]
    assert sorted(asked) == sorted(listed)
    assert found.verified == len(listed) + len(store.zarr_metadata()) + 1  # and the index


def test_a_flipped_byte_is_named_by_stream_shard_and_sample(store: Store) -> None:
    for record, stream, file in files_of(store):
        path = Path(store.root, file.file)
        for part, offsets in file.offsets.items():
            row = record.samples - 1
            for at in (offsets[row], offsets[row] + file.sizes[part][row] - 1):
                flip(path, at)
                (found,) = verify(store.url).damaged
                key = record.keys[row]
                assert found[1:] == (file.file, stream, record.shard, key)
                assert found.problem == f"column '{part}' has a wrong checksum"
                flip(path, at)
    assert verify(store.url).damaged == []


def test_a_flipped_byte_outside_all_samples_is_told_as_such(store: Store) -> None:
    for _, stream, file in files_of(store):
        path = Path(store.root, file.file)
        inside = np.zeros(file.bytes, bool)
        for part, offsets in file.offsets.items():
            for begin, size in zip(offsets, file.sizes[part], strict=True):
                inside[begin : begin + size] = True
        outside = np.flatnonzero(~inside)
        for at in outside[[0, len(outside) // 2, -1]].tolist():
            flip(path, at)
            (found,) = verify(store.url).damaged
            assert (found.stream, found.sample) == (stream, None)
            assert "outside all samples" in found.problem
            flip(path, at)


def test_pieces_are_joined(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, file = files_of(store)[0]
    flip(Path(store.root, file.file), file.offsets[next(iter(file.offsets))][1])
    expected = verify(store.url)
    for size in (1000, 4096):
        monkeypatch.setattr(file_check, "CHUNK_BYTES", size)
        assert verify(store.url) == expected


def test_all_damage_is_listed_in_one_walk(known_store: Store, capsys: Capture) -> None:
    root = Path(known_store.root)
    maps = known_store.record(0).streams["maps"][0]
    flip(root / maps.file, maps.offsets["features"][3])
    flip(root / maps.file, maps.offsets["attention"][3])
    (root / "latents" / "shard-000001.tar").unlink()
    path = root / "maps" / "shard-000003.tar"
    path.write_bytes(path.read_bytes()[: maps.bytes // 5])
    assert main([known_store.url, "--verify"]) == 1
    page = capsys.readouterr().out
    for line in (
        f"  stream 'maps', shard 0, sample '{known_key(0, 3)}', maps/shard-000000.tar: column "
        "'features' has a wrong checksum; column 'attention' has a wrong checksum",
        "  stream 'latents', shard 1, latents/shard-000001.tar: is missing",
        "  stream 'maps', shard 3, maps/shard-000003.tar: has ",
        f"sample '{known_key(3, 3)}', maps/shard-000003.tar: column 'features' is truncated",
        "to repair it, delete commits/shard-000000.json, commits/shard-000001.json, commits/shard",
    ):
        assert line in page
    assert main([known_store.url, "--verify", "--json"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found.keys() == {"verified", "damaged"}
    assert found["verified"] == 2 * len(SIZES) - 3 + 1
    assert {"stream", "shard", "sample", "file", "problem"} == found["damaged"][0].keys()
    assert found["damaged"][0]["sample"] == known_key(0, 3)


def test_another_file_in_its_place_does_not_flood_the_list(tmp_path: Path) -> None:
    store = make_random_store(tmp_path, samples=60, shard_size=30)
    path = Path(store.root, "maps", "shard-000001.tar")
    path.write_bytes(bytes(path.stat().st_size))
    found = verify(store.url).damaged
    assert len(found) == file_check.MAX_NAMED_SAMPLES + 1
    assert found[-1].problem == "14 more of its samples are damaged"


def test_a_sound_store_says_so_and_progress_goes_to_stderr(
    known_store: Store, capsys: Capture
) -> None:
    assert main([known_store.url, "--verify"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{known_store.url}: all 9 files equal their commit records\n"
    assert "B (100%) in " in captured.err


def test_other_filesystems_are_verified_too(tmp_path: Path, store: Store) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(store.root, f"/verify-{tmp_path.name}", recursive=True)
    url = f"memory://verify-{tmp_path.name}"
    sound = verify(url)
    assert (sound.damaged, sound.verified) == ([], verify(store.url).verified)
    record, stream, file = files_of(store)[2]
    path = f"/verify-{tmp_path.name}/{file.file}"
    data = bytearray(memory.cat_file(path))
    data[file.offsets[next(iter(file.offsets))][0]] ^= 128
    memory.pipe_file(path, bytes(data))
    (found,) = verify(url).damaged
    assert found[1:] == (file.file, stream, record.shard, record.keys[0])


def test_a_file_that_cannot_be_read_is_one_damage_among_others(
    known_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = file_check.read_ranges

    def refuse(filesystem: Any, path: str, ranges: Any) -> list[bytes]:
        if path.endswith("maps/shard-000001.tar"):
            raise PermissionError(f"403 for\n{path}")
        return original(filesystem, path, ranges)

    monkeypatch.setattr(file_check, "read_ranges", refuse)
    (found,) = verify(known_store.url).damaged
    assert found.problem.startswith("cannot be read: 403 for ")
    assert "\n" not in found.problem


def change_record(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda root: edit_json(root / "commits" / "shard-000001.json", change)


def swap_files(values: dict[str, Any]) -> None:
    maps = values["streams"]["maps"][0]
    maps["file"] = maps["file"].replace("000001", "000003")


@pytest.mark.parametrize(
    ("harm", "file", "problem"),
    [
        (change_record(lambda v: v.pop("keys")), "commits/shard-000001.json", "is damaged: keys"),
        (change_record(swap_files), "commits/shard-000001.json", "lists other files or columns"),
        (
            change_record(lambda v: v["keys"].__setitem__(0, v["keys"][1])),
            "commits/shard-000001.json",
            "lists a sample twice",
        ),
        (
            change_record(lambda v: v["streams"]["maps"][0]["crc32"]["features"].reverse()),
            "maps/shard-000001.tar",
            "differs from the checksum in its record",
        ),
        (
            change_record(
                lambda v: v["streams"]["maps"][0]["offsets"].update(
                    class_token=v["streams"]["maps"][0]["offsets"]["features"]
                )
            ),
            "maps/shard-000001.tar",
            "assigns the same bytes to two samples",
        ),
        (
            lambda root: (root / "commits" / "shard-000001.json").unlink(),
            "commits/shard-000001.json",
            "is missing, though the index counts it",
        ),
        (
            lambda root: edit_json(
                root / "index.json", lambda v: v["samples_per_shard"].__setitem__(1, 2)
            ),
            "index.json",
            "counts 2 samples of shard 1, its record 3",
        ),
        (
            lambda root: edit_json(
                root / "index.json", lambda v: v["bytes_per_stream"].update(maps=7)
            ),
            "index.json",
            "counts 7 bytes of stream 'maps', its records ",
        ),
        (lambda root: (root / "index.json").write_text("{"), "index.json", "is damaged"),
    ],
)
def test_records_and_index_that_disagree_are_named(
    known_store: Store, harm: Callable[[Path], None], file: str, problem: str
) -> None:
    harm(Path(known_store.root))
    found = verify(known_store.url).damaged
    assert any(d.file == file and problem in d.problem for d in found), found


def test_an_incomplete_store_is_not_a_damaged_one(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path), random_manifest(9, 3))
    assert verify(store.url) == Verification()


def test_a_record_of_a_shard_beyond_the_plan_is_no_business_of_it(known_store: Store) -> None:
    commits = Path(known_store.root, "commits")
    shutil.copy(commits / "shard-000001.json", commits / "shard-000009.json")
    assert verify(known_store.url).damaged == []


def test_an_added_stream_must_have_the_samples_of_the_others(store: Store) -> None:
    path = Path(store.root, "commits", "late", "shard-000001.json")
    keys = store.record(1).keys
    edit_json(path, lambda values: values["keys"].reverse())
    (found,) = verify(store.url).damaged
    assert found == Damage(
        "lists other samples than the store's first streams: sample 0 is "
        f"'{keys[-1]}', not '{keys[0]}'",
        "commits/late/shard-000001.json",
        "late",
        1,
    )


def test_a_stream_that_is_still_being_added_is_not_damaged(store: Store) -> None:
    Path(store.root, "commits", "late", "shard-000001.json").unlink()
    assert "though the index counts it" in verify(store.url).damaged[0].problem
    edit_json(Path(store.root, "index.json"), lambda v: v["bytes_per_stream"].pop("late"))
    assert verify(store.url).damaged == []


def with_tail(store: Store, data: bytes) -> Manifest:
    tail = {"file": "maps_teacher_tail.safetensors", "bytes": 3, "sha256": "0" * 64}
    edit_json(Path(store.root, "manifest.json"), lambda v: v["streams"]["maps"].update(tail=tail))
    Path(store.root, tail["file"]).write_bytes(data)
    return Store.open(store.url).manifest


def test_the_teachers_tail_is_verified(known_store: Store) -> None:
    with_tail(known_store, b"abc")
    (found,) = verify(known_store.url).damaged
    assert (found.stream, found.file) == ("maps", "maps_teacher_tail.safetensors")
    assert found.problem == "its bytes differ"
    Path(known_store.root, found.file).unlink()
    assert verify(known_store.url).damaged[0].problem == "is missing"


def test_zarr_metadata_must_promise_what_the_manifest_does(tmp_path: Path) -> None:
    store = make_random_store(tmp_path, samples=4, shard_size=2, format="zarr")
    edit_json(tmp_path / "maps" / "features" / "zarr.json", lambda v: v.update(shape=[9, 9]))
    (tmp_path / "maps" / "zarr.json").write_text("no")
    (tmp_path / "zarr.json").unlink()
    found = {d.file: d.problem for d in verify(store.url).damaged}
    assert found == {
        "zarr.json": "is missing",
        "maps/zarr.json": "is not zarr metadata",
        "maps/features/zarr.json": "its shape does not follow from manifest.json",
    }


def test_a_stream_on_another_disk_is_read_through_its_link(known_store: Store) -> None:
    root = Path(known_store.root)
    shutil.move(root / "maps", root.parent / "elsewhere")
    (root / "maps").symlink_to(root.parent / "elsewhere")
    assert verify(known_store.url).damaged == []


@pytest.mark.parametrize("place", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_neither_waited_for_nor_read_to_its_end(
    known_store: Store, place: Callable[[Path], None]
) -> None:
    path = Path(known_store.root, "maps", "shard-000001.tar")
    path.unlink()
    place(path)
    size, *samples = verify(known_store.url).damaged
    assert size.problem.startswith("has 0 bytes, not ")
    assert {damage.sample for damage in samples} == set(known_store.record(1).keys)
    assert all("is truncated" in damage.problem for damage in samples)


def test_shards_are_verified_while_others_are_written(known_store: Store) -> None:
    Path(known_store.root, "commits", "shard-000001.json").unlink()
    Path(known_store.root, "index.json").unlink()
    assert verify(known_store.url).damaged == []
    write_known_shard(known_store.url, known_store.manifest, 1, SIZES[1])
    assert verify(known_store.url).damaged == []
