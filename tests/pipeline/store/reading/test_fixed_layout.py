"""Rows read with one call each, against each of their arrays by itself."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.store import Store, StreamReader
from pipeline.store.arrays import ArrayReader, stream_parts
from pipeline.store.reading.fixed_layout import (
    TEXT_BYTES,
    FixedLayout,
    RowReader,
    find_fixed_layout,
)
from pipeline.store.reading.shard_index import FileTable, shard_table
from pipeline.store.reading.stream_reader import DamagedShardError
from schemas.errors import UserError
from schemas.streams import Column
from tests.helpers import edit_json, known_values
from tests.stores import make_random_store

SHARDS = np.repeat(np.arange(4), [9, 6, 6, 4])
STREAMS = ("latents", "maps")


@pytest.fixture(params=["webdataset", "zarr"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_random_store(tmp_path / "store", format=request.param)


def wanted(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shards and rows in any order, some of them twice."""
    rng = np.random.default_rng(seed)
    rows = np.array([rng.integers(6 if shard < 3 else 4) for shard in SHARDS.tolist()])
    order = rng.permutation(len(SHARDS))
    return SHARDS[order], rows[order]


def read(store: Store, stream: str, seed: int, verify: bool) -> tuple[dict[str, np.ndarray], int]:
    reader = StreamReader(store, stream, verify=verify)
    return reader.read(*wanted(seed)), reader.bytes_read


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("seed", range(4))
def test_both_ways_give_the_same_bytes_and_count_them_alike(
    store: Store, stream: str, seed: int, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[bool, int]] = []
    plain = RowReader.read

    def count(self: RowReader, *args: Any) -> tuple[bool, int]:
        used.append(plain(self, *args))
        return used[-1]

    monkeypatch.setattr(RowReader, "read", count)
    quick = read(store, stream, seed, verify)
    assert used
    assert all(is_right for is_right, _ in used)
    monkeypatch.setattr("pipeline.store.reading.stream_reader.find_fixed_layout", lambda *_: None)
    used.clear()
    general = read(store, stream, seed, verify)
    assert not used
    assert quick[1] == general[1]
    assert quick[0].keys() == general[0].keys()
    for name, array in quick[0].items():
        assert array.dtype == general[0][name].dtype
        assert array.tobytes() == general[0][name].tobytes()


def test_checksums_are_looked_at_where_they_are_asked_for(known_store: Store) -> None:
    def spoil(record: dict[str, Any]) -> None:
        record["streams"]["latents"][0]["crc32"]["label"][2] ^= 1

    edit_json(Path(known_store.root, "commits", "shard-000001.json"), spoil)
    store, at = Store.open(known_store.url), (np.array([1]), np.array([2]))
    with pytest.raises(DamagedShardError, match="column 'label': its checksum is wrong"):
        StreamReader(store, "latents").read(*at)
    found = StreamReader(store, "latents", verify=False).read(*at)
    assert found["label"].tolist() == [known_values(1, 2)["latents"]["label"]]


def test_a_class_number_is_nothing_but_digits(known_store: Store) -> None:
    """With and without checksums, because int() accepts other texts too."""
    file = known_store.record(1).streams["latents"][0]
    path = Path(known_store.root, file.file)
    whole = path.read_bytes()
    begin, size = file.offsets["label"][2], file.sizes["label"][2]
    assert whole[begin : begin + size] == b"102"
    for text in (b"+12", b" 12", b"1_2", b"-12", b"12\n"):
        path.write_bytes(whole[:begin] + text + whole[begin + size :])
        with pytest.raises(DamagedShardError, match=r"column 'label': .* is not a class number"):
            StreamReader(known_store, "latents", verify=False).read(np.array([1]), np.array([2]))


PARTS = stream_parts(
    {
        "x": Column(shape=(3,), codec="float32"),
        "label": Column(shape=(), codec="int64"),
        "packed": Column(shape=(3,), codec="float32", lossless="zstd"),
        "nothing": Column(shape=(3, 0), codec="float32"),
    }
)


def table(names: tuple[str, ...], offsets: list[list[int]], sizes: list[list[int]]) -> FileTable:
    crc32 = np.zeros(np.shape(sizes), np.uint32)
    return FileTable("f", 9, "", names, np.array(offsets), np.array(sizes), crc32)


def fixed(
    names: tuple[str, ...], offsets: list[list[int]], sizes: list[list[int]], *, npy: bool = False
) -> FixedLayout | None:
    layouts = {name: ArrayReader(part, npy=npy) for name, part in PARTS.items()}
    return find_fixed_layout(table(names, offsets, sizes), layouts)


def test_rows_that_are_alike_are_known() -> None:
    # zarr orders a shard's rows as it likes
    found = fixed(("x",), [[40], [12], [80]], [[12]] * 3)
    assert found is not None
    assert found.row_bytes == 12
    found = fixed(("x", "label"), [[0, 512], [1024, 1536]], [[140, 1], [140, 18]], npy=True)
    assert found is not None
    assert found.row_bytes == 512 + TEXT_BYTES
    assert [array.gap for array in found.arrays] == [0, 512 - 140]


@pytest.mark.parametrize(
    ("names", "offsets", "sizes", "npy"),
    [
        (("x",), [[0], [20]], [[12], [13]], False),  # another size
        (("x",), [[0], [20]], [[11], [11]], False),
        (("packed",), [[0], [20]], [[12], [12]], False),
        (("nothing",), [[0], [20]], [[0], [0]], False),
        (("x", "x"), [[0, 12], [50, 63]], [[12, 12]] * 2, False),  # another distance
        (("x", "x"), [[0, 11], [50, 61]], [[12, 12]] * 2, False),  # one within the other
        (("x", "x"), [[0, 5000], [9000, 14000]], [[12, 12]] * 2, False),  # far apart
        (("label",), [[0], [512]], [[1], [19]], True),  # more digits than a number has
        (("label",), [[0], [512]], [[1], [0]], True),
        (("x",), [], [], False),
    ],
)
def test_rows_that_are_not_are_left_to_the_general_way(
    names: tuple[str, ...], offsets: list[list[int]], sizes: list[list[int]], npy: bool
) -> None:
    assert fixed(names, offsets, sizes, npy=npy) is None


def test_a_stored_number_is_taken_for_text_only_in_tars(store: Store) -> None:
    shard = shard_table(store.record(0), "latents")
    parts = stream_parts(store.manifest.streams["latents"].columns)
    tars = store.manifest.format == "webdataset"
    layouts = {name: ArrayReader(part, npy=tars) for name, part in parts.items()}
    for file in shard.files:
        found = find_fixed_layout(file, layouts)
        assert found is not None
        for array in found.arrays:
            assert (array.nbytes == 0) == (tars and array.name == "label")


@pytest.mark.parametrize("stream", STREAMS)
def test_no_byte_of_a_row_can_be_missing(store: Store, stream: str) -> None:
    """The last row of the last shard ends where its file does, or at its padding."""
    last = np.array([3]), np.array([3])
    expected = StreamReader(store, stream).read(*last)
    for file in store.record(3).streams[stream]:
        path = Path(store.root, file.file)
        whole = path.read_bytes()
        (name,) = [
            n
            for n in file.offsets
            if file.offsets[n][3] == max(offsets[3] for offsets in file.offsets.values())
        ]
        end = file.offsets[name][3] + file.sizes[name][3]
        for length in (end - 1, end, end + 1, len(whole) - 1):
            os.truncate(path, length)
            if length < end:
                with pytest.raises(DamagedShardError, match="too short"):
                    StreamReader(store, stream).read(*last)
            else:  # truncated bytes belong to no member
                found = StreamReader(store, stream).read(*last)
                for column, array in found.items():
                    assert np.array_equal(array, expected[column])
            path.write_bytes(whole)


def damage(store: Store, rng: random.Random) -> None:
    """Something wrong with a file, or with what its record says of it."""
    shard = rng.randrange(4)
    files = [f for files in store.record(shard).streams.values() for f in files]
    path = Path(store.root, rng.choice(files).file)
    match rng.randrange(4):
        case 0:
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        case 1:
            os.truncate(path, rng.randrange(path.stat().st_size))
        case 2:
            path.unlink(missing_ok=True)
        case 3:
            field, by = rng.choice(["offsets", "sizes", "crc32"]), rng.choice([-512, -1, 1, 512])

            def lie(record: dict[str, Any]) -> None:
                file = rng.choice(record["streams"][rng.choice(STREAMS)])
                values = rng.choice(list(file[field].values()))
                row = rng.randrange(len(values))
                values[row] = max(0, values[row] + by)

            edit_json(Path(store.root, "commits", f"shard-{shard:06d}.json"), lie)


def outcome(read: Callable[[], object]) -> object:
    try:
        return read()
    except UserError as error:
        return type(error), str(error)


@pytest.mark.parametrize("seed", range(12))
def test_both_ways_find_the_same_wrong(
    store: Store, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    damage(store, rng)

    def everything(stream: str, at: int, verify: bool) -> object:
        columns = StreamReader(Store.open(store.url), stream, verify=verify).read(*wanted(at))
        return {name: (array.dtype, array.tobytes()) for name, array in columns.items()}

    def outcomes() -> list[object]:
        return [
            outcome(lambda s=stream, a=at, v=verify: everything(s, a, v))
            for stream in STREAMS
            for at in range(2)
            for verify in (True, False)
        ]

    quick = outcomes()
    monkeypatch.setattr("pipeline.store.reading.stream_reader.find_fixed_layout", lambda *_: None)
    assert outcomes() == quick
