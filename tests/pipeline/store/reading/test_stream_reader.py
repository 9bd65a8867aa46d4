"""Reading what was written, and never what was not."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.store import Store, StreamReader
from pipeline.store.reading.row_request import ShardRows
from pipeline.store.reading.stream_reader import MIN_TASK_SECONDS, DamagedShardError
from schemas.errors import UserError
from tests.helpers import (
    SIZES,
    edit_json,
    known_key,
    known_values,
    recorded_opens,
    write_known_store,
)

ALL = np.array([(shard, row) for shard, size in enumerate(SIZES) for row in range(size)])
WHOLE, RANGED = 8 << 20, 0
STREAMS = ("latents", "maps")


def check(store: Store, stream: str, where: np.ndarray, limit: int) -> StreamReader:
    reader = StreamReader(store, stream, whole_file_limit=limit)
    batch = reader.read(where[:, 0], where[:, 1])
    assert batch.keys() == store.manifest.streams[stream].columns.keys()
    for column, array in batch.items():
        expected = [known_values(*at)[stream][column] for at in where.tolist()]
        assert np.array_equal(array, np.stack(expected)), column
        assert array.dtype == (np.int64 if column == "label" else np.float16)
    return reader


@pytest.mark.parametrize("limit", [WHOLE, RANGED])
@pytest.mark.parametrize("stream", STREAMS)
def test_what_was_written_is_read_in_any_order(known_store: Store, stream: str, limit: int) -> None:
    rng = np.random.default_rng(0)
    for where in (ALL, ALL[::-1], rng.permutation(ALL), ALL[[3]], ALL[[7, 7, 0, 7]]):
        check(known_store, stream, where, limit)


@pytest.mark.parametrize("limit", [WHOLE, RANGED])
@pytest.mark.parametrize("url", ["memory://read-test/{}", "file://{}"])
def test_other_urls_are_read_the_same(tmp_path: Path, url: str, limit: int) -> None:
    store = write_known_store(url.format(tmp_path))
    assert Store.open(store.url).manifest == store.manifest
    for stream in STREAMS:
        check(Store.open(store.url), stream, ALL, limit)


def test_whole_files_are_fetched_once_and_kept_as_long_as_they_are_needed() -> None:
    """From afar; what is local the system keeps."""
    store = write_known_store("memory://kept")
    sizes = [store.record(shard).streams["maps"][0].bytes for shard in range(4)]
    reader = StreamReader(store, "maps", cache_files=2)

    def read(shard: int) -> tuple[int, int]:
        reader.read(np.array([shard]), np.array([0]))
        return reader.opens, reader.bytes_read

    assert read(0) == (1, sizes[0])
    assert read(0) == (1, sizes[0])
    assert read(1) == (2, sizes[0] + sizes[1])
    assert read(0) == (2, sizes[0] + sizes[1])
    assert read(3) == (3, sizes[0] + sizes[1] + sizes[3])  # 1 was used longest ago
    assert read(0)[0] == 3
    assert read(1)[0] == 4


def test_of_large_files_only_the_wanted_rows_are_read(known_store: Store) -> None:
    file = known_store.record(0).streams["maps"][0]
    reader = StreamReader(known_store, "maps", whole_file_limit=RANGED)
    reader.read(np.array([0]), np.array([3]))
    one = sum(sizes[3] for sizes in file.sizes.values())
    assert reader.opens == 1
    assert one <= reader.bytes_read <= one + 3 * 1024  # tar headers lie between the columns
    assert reader.bytes_read < file.bytes / 3
    reader.read(np.array([0, 0]), np.array([4, 0]))
    assert reader.opens == 2
    assert reader.bytes_read < file.bytes


def test_counters_agree_with_what_the_filesystem_saw(known_store: Store) -> None:
    reader = StreamReader(known_store, "latents", cache_files=1)
    with recorded_opens() as paths:
        for shard in (0, 1, 0, 3):
            reader.read(np.array([shard]), np.array([0]))
    shards = [path for path in paths if path.endswith(".tar")]
    assert reader.opens == len(shards) == 4
    files = [known_store.record(shard).streams["latents"][0] for shard in (0, 1, 0, 3)]
    assert reader.bytes_read == sum(size[0] for file in files for size in file.sizes.values())


def test_a_stream_that_the_store_lacks_is_named(known_store: Store) -> None:
    with pytest.raises(UserError, match="no stream 'qk'; it holds: latents, maps"):
        StreamReader(known_store, "qk")


def damaged_read(store: Store, stream: str, limit: int, verify: bool = True) -> str:
    """Reads rows 0-2 of shard 1; the complaint's text."""
    reader = StreamReader(store, stream, whole_file_limit=limit, verify=verify)
    with pytest.raises(DamagedShardError) as error:
        reader.read(np.array([1, 1, 1]), np.array([0, 1, 2]))
    message = str(error.value)
    assert f"stream '{stream}', shard 1 of {store.shown_url}" in message
    assert "\n" not in message
    return message


def shard_file(store: Store, stream: str, shard: int = 1) -> Path:
    return Path(store.root, stream, f"shard-{shard:06d}.tar")


@pytest.mark.parametrize("limit", [WHOLE, RANGED])
@pytest.mark.parametrize(
    ("stream", "column"),
    [(s, c) for s in STREAMS for c in known_values(0, 0)[s]],
)
def test_one_flipped_bit_anywhere_is_named_by_sample(
    known_store: Store, stream: str, column: str, limit: int
) -> None:
    file = known_store.record(1).streams[stream][0]
    path = shard_file(known_store, stream)
    whole = path.read_bytes()
    start, size = file.offsets[column][2], file.sizes[column][2]
    for at in {start, start + size // 2, start + size - 1}:
        data = bytearray(whole)
        data[at] ^= 1
        path.write_bytes(data)
        message = damaged_read(known_store, stream, limit)
        assert f"sample '{known_key(1, 2)}', column '{column}'" in message
        assert "checksum" in message
        other = StreamReader(known_store, stream, whole_file_limit=limit)
        other.read(np.array([1, 1]), np.array([0, 1]))  # its neighbours are unharmed


@pytest.mark.parametrize("limit", [WHOLE, RANGED])
def test_without_verification_shapes_and_dtypes_are_still_checked(
    known_store: Store, limit: int
) -> None:
    path = shard_file(known_store, "maps")
    data = bytearray(path.read_bytes())
    at = data.index(b"'<f2'")
    data[at : at + 5] = b"'|O8'"  # a pickle, if anyone believed it
    path.write_bytes(data)
    message = damaged_read(known_store, "maps", limit, verify=False)
    assert "not a float16 array" in message


@pytest.mark.parametrize("limit", [WHOLE, RANGED])
@pytest.mark.parametrize("stream", STREAMS)
def test_truncated_file_is_named(known_store: Store, stream: str, limit: int) -> None:
    path = shard_file(known_store, stream)
    file = known_store.record(1).streams[stream][0]
    offset = max(offsets[2] for offsets in file.offsets.values())
    whole = path.read_bytes()
    for length in (0, 100, offset, offset + 1):
        path.write_bytes(whole[:length])
        assert "damaged" in damaged_read(known_store, stream, limit)


@pytest.mark.parametrize("limit", [WHOLE, RANGED])
def test_missing_file_is_named(known_store: Store, limit: int) -> None:
    shard_file(known_store, "maps").unlink()
    assert "is missing" in damaged_read(known_store, "maps", limit)


def test_another_shard_s_file_is_not_taken_for_this_one(known_store: Store) -> None:
    shard_file(known_store, "maps").write_bytes(shard_file(known_store, "maps", 0).read_bytes())
    assert known_key(1, 0) in damaged_read(known_store, "maps", WHOLE)


def test_rows_beyond_the_record_are_refused(known_store: Store) -> None:
    reader = StreamReader(known_store, "latents")
    with pytest.raises(DamagedShardError, match=r"shard 1 .* has 3 samples"):
        reader.read(np.array([1, 1]), np.array([3, 0]))


def test_a_record_of_other_columns_is_refused(known_store: Store) -> None:
    def drop_column(record: dict) -> None:
        for table in ("offsets", "sizes", "crc32"):
            del record["streams"]["latents"][0][table]["std"]

    edit_json(Path(known_store.root, "commits", "shard-000001.json"), drop_column)
    assert "other columns" in damaged_read(Store.open(known_store.url), "latents", WHOLE)


def test_quick_reads_go_together(known_store: Store) -> None:
    """With slow samples each shard has its own thread."""
    wanted = [
        ShardRows(shard, np.arange(n), np.arange(n)) for shard, n in enumerate([2, 1, 1, 3, 1])
    ]
    reader = StreamReader(known_store, "maps")

    def lengths() -> list[int]:
        parts = list(reader.split_into_tasks(wanted))
        assert [some for part in parts for some in part] == wanted
        return [len(part) for part in parts]

    assert lengths() == [1] * 5  # nothing is known yet
    for pace, expected in [
        (MIN_TASK_SECONDS, [1, 1, 1, 1, 1]),
        (MIN_TASK_SECONDS / 2, [1, 2, 1, 1]),
        (MIN_TASK_SECONDS / 3, [2, 2, 1]),
        (MIN_TASK_SECONDS / 100, [5]),
    ]:
        reader.seconds_per_sample = pace
        assert lengths() == expected
    assert not list(reader.split_into_tasks([]))
    reader = StreamReader(write_known_store("memory://together"), "maps")
    reader.seconds_per_sample = MIN_TASK_SECONDS / 100
    assert lengths() == [1] * 5  # what was quick lay in memory


def test_how_long_samples_take_is_noted(
    known_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = StreamReader(known_store, "maps")
    for wait, least, most in [(0, 0, 0.05), (0.1, 0.05, 1), (0, 0.04, 0.9), (0, 0.03, 0.8)]:
        monkeypatch.setattr(reader, "_fill_shard", lambda *_, wait=wait: time.sleep(wait))
        reader.fill(
            {}, [ShardRows(0, np.arange(1), np.arange(1)), ShardRows(1, np.arange(1), np.arange(1))]
        )
        assert least < reader.seconds_per_sample < most
