"""Shards: deterministic tars that stock webdataset reads, committed as a whole or not at all."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from pipeline.store import ShardWriter, Store
from tests.helpers import (
    SIZES,
    Values,
    all_files,
    known_key,
    known_manifest,
    known_values,
    write_known_shard,
    write_known_store,
)


def test_a_shard_written_twice_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    write_known_store(str(tmp_path / "a"))
    write_known_store(str(tmp_path / "b"))
    assert all_files(tmp_path / "a") == all_files(tmp_path / "b")
    before = all_files(tmp_path / "a")
    write_known_shard(str(tmp_path / "a"), known_manifest(), 1, SIZES[1])
    assert all_files(tmp_path / "a") == before


def test_a_store_is_exactly_these_files(known_store: Store) -> None:
    shards = [f"shard-{shard:06d}" for shard in range(len(SIZES))]
    assert set(all_files(Path(known_store.root))) == {
        "manifest.json",
        "index.json",
        *(f"commits/{shard}.json" for shard in shards),
        *(f"{stream}/{shard}.tar" for stream in ("latents", "maps") for shard in shards),
    }


def test_members_are_arrays_and_class_numbers_alone(known_store: Store) -> None:
    for stream, suffixes in {
        "latents": ["mean.npy", "std.npy", "cls"],
        "maps": ["features.npy", "class_token.npy", "attention.npy"],
    }.items():
        with tarfile.open(Path(known_store.root, stream, "shard-000000.tar")) as tar:
            members = tar.getmembers()
        names = [f"{known_key(0, row)}.{suffix}" for row in range(5) for suffix in suffixes]
        assert [member.name for member in members] == names
        assert all(member.isreg() and member.mtime == 0 for member in members)


@pytest.mark.parametrize("stream", ["latents", "maps"])
def test_stock_webdataset_reads_the_tars(known_store: Store, stream: str) -> None:
    urls = [str(path) for path in sorted(Path(known_store.root, stream).glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    expected = [(shard, row) for shard, size in enumerate(SIZES) for row in range(size)]
    assert [sample["__key__"] for sample in samples] == [known_key(*at) for at in expected]
    for sample, at in zip(samples, expected, strict=True):
        for column, value in known_values(*at)[stream].items():
            found = sample["cls" if column == "label" else f"{column}.npy"]
            assert np.array_equal(found, value)
            assert isinstance(found, int if column == "label" else np.ndarray)
        assert len([name for name in sample if not name.startswith("__")]) == 3


def test_numpy_itself_reads_the_members_without_pickle(known_store: Store) -> None:
    with tarfile.open(Path(known_store.root, "maps", "shard-000001.tar")) as tar:
        handle = tar.extractfile(f"{known_key(1, 2)}.attention.npy")
        assert handle is not None
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            file.write(handle.read())
            file.flush()
            found = np.load(file.name, allow_pickle=False)
    assert np.array_equal(found, known_values(1, 2)["maps"]["attention"])


def test_the_record_describes_the_files(known_store: Store) -> None:
    for shard, samples in enumerate(SIZES):
        record = known_store.record(shard)
        assert (record.samples, record.skipped) == (samples, ())
        assert record.keys == [known_key(shard, row) for row in range(samples)]
        for (file,) in record.streams.values():
            data = Path(known_store.root, file.file).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
            for column, offsets in file.offsets.items():
                for row, start in enumerate(offsets):
                    part = data[start : start + file.sizes[column][row]]
                    assert zlib.crc32(part) == file.crc32[column][row]


@pytest.mark.parametrize("key", ["k" * 300, "naïve/日本語", "with space/and'quote", "a" * 99])
def test_unusual_keys_are_found_again(tmp_path: Path, key: str) -> None:
    manifest = known_manifest((2,))
    Store.create(str(tmp_path), manifest)
    with ShardWriter(str(tmp_path), manifest, 0) as writer:
        writer.add(key, known_values(0, 0))
        writer.add("next", known_values(0, 1))
        record = writer.commit()
    (file,) = record.streams["latents"]
    with tarfile.open(tmp_path / file.file) as tar:
        member = tar.getmember(f"{key}.std.npy")
        assert member.offset_data == file.offsets["std"][0]
        assert tar.getmember("next.mean.npy").offset_data == file.offsets["mean"][1]


@pytest.mark.parametrize("url", ["{}", "file://{}", "memory://{}"])
def test_leaving_by_an_exception_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    url = url.format(tmp_path / "store")
    store = Store.create(url, known_manifest((2,)))
    kept = set(store.filesystem.find(store.root))

    def die_in_the_middle() -> None:
        with ShardWriter(url, store.manifest, 0) as writer:
            writer.add("a", known_values(0, 0))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        die_in_the_middle()
    assert set(store.filesystem.find(store.root)) == kept
    assert all_files(tmp_path / "scratch") == {}
    assert store.missing_shards() == [0]


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path), known_manifest((2,)))
    with ShardWriter(store.url, store.manifest, 0) as writer:
        writer.add("a", known_values(0, 0))
    assert set(all_files(tmp_path)) == {"manifest.json"}


def test_while_a_shard_is_written_only_temporary_names_exist(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path), known_manifest((2,)))
    with ShardWriter(store.url, store.manifest, 0) as writer:
        writer.add("a", known_values(0, 0))
        names = [Path(name).name for name in all_files(tmp_path) if name != "manifest.json"]
        assert len(names) == 2
        assert all(name.startswith(".tmp-") for name in names)
        assert store.missing_shards() == [0]
        writer.commit()
    assert store.missing_shards() == []


def test_a_failure_between_files_and_record_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(str(tmp_path), known_manifest((1,)))

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.store.writer.write_atomic", fail)
        with pytest.raises(OSError, match="full"):
            write_known_shard(store.url, store.manifest, 0, 1)
    assert store.missing_shards() == [0]
    write_known_shard(store.url, store.manifest, 0, 1)
    assert store.missing_shards() == []


def spoiled(stream: str, column: str, value: np.ndarray | int) -> Values:
    values = known_values(0, 0)
    values[stream][column] = value
    return values


LATENT = known_manifest((1,)).streams["latents"].columns["mean"].shape


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (spoiled("latents", "mean", np.full(LATENT, np.nan)), "latents.mean: .*not finite"),
        (spoiled("latents", "std", np.full(LATENT, np.inf)), "latents.std: .*not finite"),
        (spoiled("latents", "std", np.full(LATENT, 1e5)), "latents.std: .*not finite in float16"),
        (spoiled("maps", "class_token", np.zeros(5)), r"maps.class_token: expected .* got \(5,\)"),
        (spoiled("latents", "mean", np.zeros(LATENT).T), "latents.mean: expected shape"),
        (spoiled("latents", "label", -1), "latents.label: -1 is not a class number"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_that_cannot_be_kept_are_refused_by_sample(
    tmp_path: Path, values: Values, reason: str
) -> None:
    store = Store.create(str(tmp_path), known_manifest((2,)))
    with ShardWriter(store.url, store.manifest, 0) as writer:
        writer.add("good", known_values(0, 0))
        with pytest.raises(ValueError, match=f"sample 'bad/one', {reason}"):
            writer.add("bad/one", values)
    assert set(all_files(tmp_path)) == {"manifest.json"}


def test_other_filesystems_get_the_same_bytes(known_store: Store) -> None:
    store = write_known_store("memory://known-copy/store")
    filesystem = fsspec.filesystem("memory")
    found = {
        path.removeprefix(f"{store.root}/"): filesystem.cat_file(path)
        for path in filesystem.find(store.root)
    }
    assert found == all_files(Path(known_store.root))
