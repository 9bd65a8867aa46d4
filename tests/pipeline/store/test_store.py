"""Opening, completing and distrusting a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.store import ShardWriter, Store
from schemas.errors import UserError
from schemas.store import SkippedImage
from tests.helpers import (
    SIZES,
    edit_json,
    known_manifest,
    known_values,
    write_known_shard,
    write_known_store,
)

Change = Callable[[dict[str, Any]], object]


def complaint(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_store_is_opened_as_it_was_created(known_store: Store) -> None:
    again = Store.open(known_store.url)
    assert again.manifest == known_store.manifest
    assert again.missing_shards() == []
    index = again.index()
    assert index.samples_per_shard == list(SIZES)
    assert index.bytes_per_stream == {
        stream: sum(path.stat().st_size for path in Path(again.root, stream).glob("*.tar"))
        for stream in ("latents", "maps")
    }
    assert index == again.build_index()


def test_a_shard_without_its_record_does_not_exist(known_store: Store) -> None:
    Path(known_store.root, "commits", "shard-000001.json").unlink()
    store = Store.open(known_store.url)
    assert store.missing_shards() == [1]
    assert store.committed_shards() == {0, 2, 3}
    assert "never committed" in complaint(lambda: store.record(1))


def test_incomplete_store_says_what_is_missing(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path), known_manifest())
    assert store.missing_shards() == [0, 1, 2, 3]
    for shard in (0, 2):
        write_known_shard(store.url, store.manifest, shard, SIZES[shard])
    message = complaint(Store.open(store.url).index)
    assert str(tmp_path) in message
    assert "2 of 4 shards are missing (first: 1)" in message
    with pytest.raises(UserError, match="never committed"):
        store.finish()
    assert not (tmp_path / "index.json").exists()


def test_a_complete_store_without_index_is_summed_up(known_store: Store) -> None:
    expected = known_store.index()
    Path(known_store.root, "index.json").unlink()
    assert Store.open(known_store.url).index() == expected


def test_leftovers_are_no_records(known_store: Store) -> None:
    commits = Path(known_store.root, "commits")
    for name in (".tmp-shard-000009.json", "shard-9.json", "shard-000009.json.bak", "notes.txt"):
        (commits / name).write_text("{}")
    assert known_store.committed_shards() == {0, 1, 2, 3}


def test_finish_lists_skipped_images_in_the_manifest(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path), known_manifest((2, 1, 2)))
    bad = SkippedImage(key="k", path="a/k.jpg", error="not an image")
    for shard, samples in enumerate((2, 1, 2)):
        with ShardWriter(store.url, store.manifest, shard) as writer:
            for row in range(samples):
                writer.add(f"{shard}-{row}", known_values(shard, row))
            record = writer.commit(skipped=[bad] if shard == 1 else [])
        assert record.samples == samples
    store.finish()
    for found in (store, Store.open(store.url)):
        assert found.manifest.skipped == (bad,)
        assert found.manifest.dataset.samples == 6
        assert found.index().samples_per_shard == [2, 1, 2]


@pytest.mark.parametrize("url", ["{}", "file://{}", "memory://{}"])
def test_existence_and_absence(tmp_path: Path, url: str) -> None:
    url = url.format(tmp_path / "store")
    assert not Store.exists(url)
    assert "holds no store: manifest.json is missing" in complaint(lambda: Store.open(url))
    Store.create(url, known_manifest())
    assert Store.exists(url)
    assert Store.open(url).missing_shards() == [0, 1, 2, 3]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    url = str(tmp_path / "file" / "store")
    assert f"--store '{url}' cannot be reached" in complaint(
        lambda: Store.create(url, known_manifest())
    )
    assert "--store" in complaint(lambda: Store.open(url))


def test_secrets_never_show_up(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://me:hunter2@host/secret?token=hunter3"
    shown = "memory://host/secret"

    def hides(message: str) -> bool:
        return shown in message and "hunter" not in message

    assert hides(complaint(lambda: Store.open(url)))
    store = Store.create(url, known_manifest())
    assert hides(complaint(store.index))
    assert hides(complaint(lambda: store.record(0)))
    assert hides(store.shown_url)
    assert "hunter" not in store.manifest.model_dump_json()
    store.filesystem.pipe_file(f"{store.root}/manifest.json", b"{")
    assert hides(complaint(lambda: Store.open(url)))

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(f"403 for\n{url}: not yours")

    memory = fsspec.get_filesystem_class("memory")
    for name in ("cat_file", "pipe_file", "info"):
        monkeypatch.setattr(memory, name, refuse)
    actions: list[Callable[[], object]] = [
        lambda: Store.open(url),
        lambda: Store.exists(url),
        lambda: Store.create(url, known_manifest()),
    ]
    for action in actions:
        message = complaint(action)
        assert hides(message)
        assert "403 for" in message


def set_path(*path: Any, to: Any) -> Change:
    def change(values: dict[str, Any]) -> None:
        for part in path[:-1]:
            values = values[part]
        values[path[-1]] = to

    return change


TAIL = {"file": "x.safetensors", "bytes": 1, "sha256": "0" * 64}
FEATURES = ("streams", "maps", "columns", "features")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_path(*FEATURES, "shape", to=[1 << 24, 1 << 24]), "elements; the limit is"),
        (set_path(*FEATURES, "shape", to=[1 << 40]), "shape"),
        (set_path(*FEATURES, "shape", to=[-1, 4]), "shape"),
        (set_path(*FEATURES, "codec", to="object"), "codec"),
        (set_path("streams", "../../etc", to={"kind": "teacher", "columns": {}}), "streams"),
        (set_path("streams", "maps", "columns", "a/b", to={"shape": [], "codec": "int64"}), "a/b"),
        (set_path("num_shards", to=5), "do not hold"),
        (set_path("dataset", "samples", to=1 << 50), "samples"),
        (set_path("shard_size", to=0), "shard_size"),
        (set_path("streams", "maps", "teacher", "weights_sha256", to="no hash"), "weights_sha256"),
        (set_path("hello", to=1), "hello"),
        (set_path("format", to="pickle"), "format"),
        (lambda values: values["streams"]["maps"].pop("teacher"), "teacher"),
        (lambda values: values["streams"].pop("latents"), "no stream 'latents'"),
        (set_path("streams", "maps", "tail", to={**TAIL, "file": "../x.safetensors"}), "tail"),
    ],
)
def test_hostile_manifest_is_refused(known_store: Store, change: Change, reason: str) -> None:
    edit_json(Path(known_store.root, "manifest.json"), change)
    message = complaint(lambda: Store.open(known_store.url))
    assert message.startswith(f"{known_store.url}/manifest.json is damaged: ")
    assert reason in message


def test_stores_from_before_the_first_release_are_refused(known_store: Store) -> None:
    edit_json(Path(known_store.root, "manifest.json"), set_path("version", to=1))
    assert "extract the store anew" in complaint(lambda: Store.open(known_store.url))


def test_a_manifest_of_absurdly_many_shards_is_refused(known_store: Store) -> None:
    def absurd(values: dict[str, Any]) -> None:
        values["shard_size"] = 1
        values["num_shards"] = values["dataset"]["samples"] = 1 << 30

    edit_json(Path(known_store.root, "manifest.json"), absurd)
    assert "num_shards" in complaint(lambda: Store.open(known_store.url))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version": 2}'])
@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("manifest.json", lambda url: Store.open(url)),
        ("index.json", lambda url: Store.open(url).index()),
        ("commits/shard-000001.json", lambda url: Store.open(url).record(1)),
    ],
)
def test_what_is_no_json_of_ours_is_named(
    known_store: Store, file: str, read: Callable[[str], object], text: bytes
) -> None:
    Path(known_store.root, file).write_bytes(text)
    message = complaint(lambda: read(known_store.url))
    assert message.startswith(f"{known_store.url}/{file} is damaged: ")


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("manifest.json", lambda url: Store.open(url)),
        ("index.json", lambda url: Store.open(url).index()),
        ("commits/shard-000001.json", lambda url: Store.open(url).record(1)),
    ],
)
def test_newer_versions_are_refused(
    known_store: Store, file: str, read: Callable[[str], object], at_the_end: bool
) -> None:
    path = Path(known_store.root, file)
    values = json.loads(path.read_text())
    values.pop("version")
    new = {"version": 3, "hello": 1}
    path.write_text(json.dumps({**values, **new} if at_the_end else {**new, **values}))
    message = complaint(lambda: read(known_store.url))
    assert file in message
    assert "version" in message or "hello" in message
    if not at_the_end:
        assert "is of version 3, newer than this software knows (2)" in message


MAPS = ("streams", "maps", 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *(
            (set_path(*MAPS, "file", to=file), "is not a plain path below the store")
            for file in (
                "../../../etc/passwd",
                "/etc/passwd",
                "maps/../../x",
                "maps/./x",
                "maps//x",
                "~/x",
                "s3://bucket/x",
                "maps/x\n",
                "maps\\x",
                "",
            )
        ),
        (set_path(*MAPS, "offsets", "features", 0, to=1 << 30), "reaches past the end"),
        (set_path(*MAPS, "offsets", "features", 0, to=-5), "offsets"),
        (set_path(*MAPS, "sizes", "features", 2, to=1 << 39), "reaches past the end"),
        (set_path(*MAPS, "sizes", "features", to=[1, 1]), "unequal"),
        (set_path(*MAPS, "crc32", "features", 0, to=1 << 32), "crc32"),
        (set_path(*MAPS, "bytes", to=1), "reaches past the end"),
        (set_path(*MAPS, "bytes", to=1 << 60), "bytes"),
        (lambda values: values["streams"]["maps"].append(values["streams"]["maps"][0]), "twice"),
        (set_path("samples", to=1 << 39), "counts 549755813888 samples"),
        (set_path("samples", to=2), "counts 2 samples"),
        (set_path("keys", to=["a"]), "counts 3 samples"),
        (set_path("shard", to=2), "does not belong to this store"),
        (lambda values: values["streams"].pop("maps"), "does not belong to this store"),
    ],
)
def test_hostile_record_is_refused(known_store: Store, change: Change, reason: str) -> None:
    edit_json(Path(known_store.root, "commits", "shard-000001.json"), change)
    message = complaint(lambda: Store.open(known_store.url).record(1))
    assert message.startswith(f"{known_store.url}/commits/shard-000001.json")
    assert reason in message


@pytest.mark.parametrize("counts", [[5, 3, 0], [5, 3, 0, 4, 1], [5, 3, 0, 1 << 39], [-1, 0, 0, 0]])
def test_hostile_index_is_refused(known_store: Store, counts: list[int]) -> None:
    change = set_path("samples_per_shard", to=counts)
    edit_json(Path(known_store.root, "index.json"), change)
    assert "index.json" in complaint(Store.open(known_store.url).index)


@pytest.mark.parametrize("sizes", [{}, {"latents": 1}, {"latents": 1, "maps": 1, "zzz": 5}])
def test_an_index_of_other_streams_is_refused(known_store: Store, sizes: dict[str, int]) -> None:
    edit_json(Path(known_store.root, "index.json"), set_path("bytes_per_stream", to=sizes))
    assert "does not fit its manifest" in complaint(Store.open(known_store.url).index)


def test_completing_a_store_keeps_what_is_committed(tmp_path: Path) -> None:
    store = write_known_store(str(tmp_path))
    (tmp_path / "commits" / "shard-000003.json").unlink()
    record = (tmp_path / "commits" / "shard-000000.json").read_bytes()
    again = Store.open(store.url)
    for shard in again.missing_shards():
        write_known_shard(again.url, again.manifest, shard, SIZES[shard])
    again.finish()
    assert (tmp_path / "commits" / "shard-000000.json").read_bytes() == record
    assert Store.open(store.url).index().samples_per_shard == list(SIZES)
