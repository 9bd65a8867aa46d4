"""Stores of zarr arrays: read like tars, and by stock zarr."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import zarr
from numcodecs import Blosc, Zstd

from pipeline.inspect.verify import verify_store
from pipeline.store import ShardWriter, Store, StreamReader
from pipeline.store.arrays import stream_parts
from pipeline.store.reading.stream_reader import DamagedShardError
from schemas.store import Manifest
from tests.helpers import (
    SIZES,
    all_files,
    edit_json,
    known_key,
    known_manifest,
    known_values,
    write_known_shard,
)
from tests.stores import add_random_stream

ALL = np.array([(shard, row) for shard, size in enumerate(SIZES) for row in range(size)])
WHOLE, RANGED = 8 << 20, 0


def manifest_of(format: str, lossless: str = "none") -> Manifest:
    """That of ``known_store``, with features compressed."""
    values = known_manifest().model_dump(mode="json")
    values["format"] = format
    values["streams"]["maps"]["columns"]["features"]["lossless"] = lossless
    return Manifest.model_validate(values)


def write(folder: Path, format: str = "zarr", lossless: str = "none") -> Store:
    store = Store.create(str(folder), manifest_of(format, lossless))
    for shard, samples in enumerate(SIZES):
        with ShardWriter(store.url, store.manifest, shard) as writer:
            for row in range(samples):
                writer.add(known_key(shard, row), known_values(shard, row))
            writer.commit()
    store.finish()
    return store


@pytest.mark.parametrize("lossless", ["none", "zstd", "blosc"])
@pytest.mark.parametrize("limit", [WHOLE, RANGED])
def test_what_was_written_is_read_by_us_and_by_zarr(
    tmp_path: Path, lossless: str, limit: int
) -> None:
    store = write(tmp_path, lossless=lossless)
    rng = np.random.default_rng(0)
    group = zarr.open_group(tmp_path, mode="r")
    for stream in ("latents", "maps"):
        for where in (ALL, rng.permutation(ALL), ALL[[3]], ALL[[7, 7, 0, 7]]):
            reader = StreamReader(store, stream, whole_file_limit=limit)
            batch = reader.read(where[:, 0], where[:, 1])
            places = where[:, 0] * store.manifest.shard_size + where[:, 1]
            for name, array in batch.items():
                expected = np.stack([known_values(*at)[stream][name] for at in where.tolist()])
                assert np.array_equal(array, expected), name
                stock: Any = group[f"{stream}/{name}"]
                assert np.array_equal(stock[:][places], expected), name
                assert (stock.dtype, stock.chunks[0]) == (array.dtype, 1)
                assert stock.shards[0] == store.manifest.shard_size
    assert Path(tmp_path, "maps", "features", "c", "0", "0", "0").is_file()
    assert not Path(tmp_path, "maps", "features", "c", "2").exists()  # a shard without samples


def test_either_format_and_compression_holds_the_same_numbers(tmp_path: Path) -> None:
    stores = [
        write(tmp_path / f"{format}-{lossless}", format, lossless)
        for format in ("webdataset", "zarr")
        for lossless in ("none", "zstd", "blosc")
    ]
    assert len({store.index().samples_per_shard.__repr__() for store in stores}) == 1
    first, *others = (StreamReader(s, "maps").read(ALL[:, 0], ALL[:, 1]) for s in stores)
    for other in others:
        for name, array in first.items():
            assert np.array_equal(other[name], array)


def test_the_same_store_twice_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "a", lossless="zstd")
    write(tmp_path / "b", lossless="zstd")
    assert all_files(tmp_path / "a") == all_files(tmp_path / "b")


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path), manifest_of("zarr"))
    before = set(all_files(tmp_path))
    with ShardWriter(store.url, store.manifest, 0) as writer:
        writer.add("a", known_values(0, 0))
    assert set(all_files(tmp_path)) == before


@pytest.mark.parametrize("limit", [WHOLE, RANGED])
def test_damage_is_named_by_sample(tmp_path: Path, limit: int) -> None:
    store = write(tmp_path, lossless="zstd")
    files = {next(iter(f.offsets)): f for f in store.record(1).streams["maps"]}
    for name, file in files.items():
        path = tmp_path / file.file
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[file.offsets[name][2] + file.sizes[name][2] // 2] ^= 1
        path.write_bytes(damaged)
        reader = StreamReader(store, "maps", whole_file_limit=limit)
        with pytest.raises(DamagedShardError, match=f"'{known_key(1, 2)}', column '{name}'"):
            reader.read(np.array([1, 1]), np.array([0, 2]))
        path.write_bytes(whole[: file.offsets[name][2] + 1])
        reader = StreamReader(store, "maps", whole_file_limit=limit)
        with pytest.raises(DamagedShardError, match="too short"):
            reader.read(np.array([1]), np.array([2]))
        path.unlink()
        with pytest.raises(DamagedShardError, match="is missing"):
            StreamReader(store, "maps", whole_file_limit=limit).read(np.array([1]), np.array([0]))
        path.write_bytes(whole)


def test_a_shard_that_was_never_committed_is_not_read_as_zeros(tmp_path: Path) -> None:
    store = write(tmp_path)
    (tmp_path / "commits" / "shard-000001.json").unlink()
    with pytest.raises(Exception, match="never committed"):
        StreamReader(Store.open(store.url), "latents").read(np.array([1]), np.array([0]))


@pytest.mark.parametrize("lossless", ["none", "zstd", "blosc"])
def test_stock_webdataset_opens_the_tars(tmp_path: Path, lossless: str) -> None:
    store = write(tmp_path, "webdataset", lossless)
    decompress = {"none": bytes, "zstd": Zstd().decode, "blosc": Blosc().decode}[lossless]
    suffix = {"none": "", "zstd": ".zst", "blosc": ".blosc"}[lossless]
    path = str(Path(store.root) / "maps" / "shard-000000.tar")
    samples = list(webdataset.WebDataset(path, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [known_key(0, row) for row in range(5)]
    for row, sample in enumerate(samples):
        data = bytes(decompress(sample[f"features.npy{suffix}"]))
        found = np.load(io.BytesIO(data), allow_pickle=False)
        assert np.array_equal(found, known_values(0, row)["maps"]["features"])


def test_metadata_lists_every_array_before_any_shard_is_there(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path), manifest_of("zarr"))
    group = zarr.open_group(tmp_path, mode="r")
    for name, stream in store.manifest.streams.items():
        for part, about in stream_parts(stream.columns).items():
            array: Any = group[f"{name}/{part}"]
            assert array.shape == (20, *about.shape)


def rows_in_zarr(sizes: tuple[int, ...], largest: int) -> list[tuple[int, int] | None]:
    """(shard, row) in each row of an array up to the last sample; None without a sample."""
    rows = [(n, r) if r < size else None for n, size in enumerate(sizes) for r in range(largest)]
    return rows[: max(place for place, row in enumerate(rows) if row is not None) + 1]


@pytest.mark.parametrize("sizes", [SIZES, (5, 5, 2), (5, 5), (0, 5, 0), (5, 0, 1, 0)])
def test_stock_zarr_sees_the_true_number_of_samples(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """The length of the arrays where no image was skipped before the last sample; else the
    attribute, and rows that are no class and not numbers. Before the last commit too, no row that
    was not written has a class."""
    manifest = known_manifest(sizes).model_copy(update={"format": "zarr"})
    store = Store.create(str(tmp_path), manifest)
    assert set(zarr.open_group(tmp_path, mode="r")["latents/label"][:]) == {-1}
    for shard, samples in enumerate(sizes):
        write_known_shard(store.url, manifest, shard, samples)
    store.finish()
    add_random_stream(store, "late")
    expected = rows_in_zarr(sizes, 5)
    group: Any = zarr.open_group(tmp_path, mode="r")
    labels = [-1 if row is None else 100 * row[0] + row[1] for row in expected]
    assert group["latents/label"][:].tolist() == labels
    number = group["latents/label"].attrs.get("samples", len(labels))
    assert number == group.attrs.get("samples", len(labels)) == sum(sizes)
    assert dict(group.attrs) == ({} if len(labels) == sum(sizes) else {"samples": sum(sizes)})
    for stream, stored in store.manifest.streams.items():
        for part, about in stream_parts(stored.columns).items():
            array = group[f"{stream}/{part}"]
            assert array.shape == (len(labels), *about.shape)
            assert dict(array.attrs) == dict(group.attrs)
            if array.dtype.kind == "f":
                empty = [bool(np.isnan(array[n]).all()) for n in range(len(labels))]
                assert empty == [row is None for row in expected], f"{stream}/{part}"
    assert verify_store(Store.open(store.url)).damaged == []


def test_arrays_of_earlier_versions_are_sound(tmp_path: Path) -> None:
    """They have rows for full shards, 0 where there is no sample, and no attribute."""
    store = write(tmp_path)
    for path, data in store.zarr_metadata().items():
        values = json.loads(data)
        if values["node_type"] == "array":
            values["fill_value"] = 0
        (tmp_path / path).write_text(json.dumps(values))
    assert zarr.open_group(tmp_path, mode="r")["latents/label"].shape == (20,)
    assert verify_store(Store.open(store.url)).damaged == []


def test_a_wrong_number_of_samples_is_damage(tmp_path: Path) -> None:
    store = write(tmp_path)
    edit_json(tmp_path / "latents/label/zarr.json", lambda v: v.update(shape=[18]))
    edit_json(tmp_path / "latents/mean/zarr.json", lambda v: v.update(attributes={"samples": 13}))
    edit_json(tmp_path / "latents/std/zarr.json", lambda v: v.update(shape=[]))
    found = {damage.file: damage.problem for damage in verify_store(store).damaged}
    assert found == {
        "latents/label/zarr.json": "its shape does not follow from manifest.json",
        "latents/mean/zarr.json": "its attribute samples does not follow from manifest.json",
        "latents/std/zarr.json": "its shape does not follow from manifest.json",
    }


def test_a_damaged_record_is_not_damage_of_the_arrays(tmp_path: Path) -> None:
    store = write(tmp_path)
    (tmp_path / "commits" / "shard-000003.json").write_text("{}")
    found = verify_store(Store.open(store.url)).damaged
    assert not [damage for damage in found if damage.file.endswith("zarr.json")]
