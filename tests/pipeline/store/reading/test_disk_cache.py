"""The local disk cache: what it holds, for whom, and how little may go wrong because of it."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipeline.storage.files import TEMPORARY
from pipeline.store import Batch, BatchLoader, SampleOrder, Store
from pipeline.store.reading.disk_cache import DiskCache
from schemas.errors import UserError
from tests.helpers import SIZES

PLENTY = 1 << 30
MEMORY = [0, PLENTY]  # rows out of the cached files, or whole files


def some(seed: int, size: int = 100) -> tuple[str, bytes]:
    data = np.random.default_rng(seed).bytes(size)
    return hashlib.sha256(data).hexdigest(), data


def stored(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir() if len(path.name) == 64}


def test_a_file_is_fetched_once_and_found_by_another_process(tmp_path: Path) -> None:
    name, data = some(0)
    assert DiskCache(str(tmp_path), 1000).fill(name, 100, lambda: data) == data
    again = DiskCache(str(tmp_path), 1000)
    path = again.path(name)
    assert path is not None
    assert path.read_bytes() == data
    assert again.fill(name, 100, lambda: pytest.fail("fetched twice")) is None
    assert again.path(some(1)[0]) is None


def test_what_is_not_what_it_should_be_is_not_kept(tmp_path: Path) -> None:
    name, data = some(0)
    cache = DiskCache(str(tmp_path), 1000)
    assert cache.fill(name, 100, lambda: data[:-1]) == data[:-1]
    assert cache.fill(name, 100, lambda: data[:-1] + b"x") == data[:-1] + b"x"
    with pytest.raises(FileNotFoundError):
        cache.fill(name, 100, lambda: (tmp_path / "nothing").read_bytes())
    assert stored(tmp_path) == {}


def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 450)
    files = [some(seed) for seed in range(5)]
    for age, (name, data) in enumerate(files[:4]):
        cache.fill(name, 100, lambda data=data: data)
        os.utime(tmp_path / name, (0, 1000 + age))
    cache.path(files[0][0])  # a use
    cache.fill(files[4][0], 100, lambda: files[4][1])
    assert stored(tmp_path).keys() == {files[i][0] for i in (0, 3, 4)} | {files[2][0]}
    assert cache.fill(some(9, 451)[0], 451, lambda: some(9, 451)[1]) == some(9, 451)[1]
    assert len(stored(tmp_path)) == 4  # what does not fit at all pushes nothing out


def test_many_workers_stay_within_the_limit(tmp_path: Path) -> None:
    """Several caches on one folder, as several processes have them: flock is per open file."""
    limit = 1000
    caches = [DiskCache(str(tmp_path), limit) for _ in range(4)]
    files = [some(seed, 90) for seed in range(60)]
    sizes = []

    def work(cache: DiskCache) -> None:
        for name, data in files:
            cache.fill(name, 90, lambda data=data: data)
            total = 0
            for entry in os.scandir(tmp_path):
                try:
                    total += entry.stat().st_size if not entry.name.startswith(".total") else 0
                except FileNotFoundError:
                    continue
            sizes.append(total)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, caches))
    assert max(sizes) <= limit + 90 * 4  # a listing may see both the old and the new
    assert sum(path.stat().st_size for path in stored(tmp_path).values()) <= limit
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


def test_garbage_of_crashes_is_cleared_away_and_counted_meanwhile(tmp_path: Path) -> None:
    old, new = tmp_path / f"{TEMPORARY}old", tmp_path / f"{TEMPORARY}new"
    old.write_bytes(bytes(500))
    os.utime(old, (0, time.time() - 7200))
    new.write_bytes(bytes(950))
    (tmp_path / ".total").write_text("nonsense")
    (tmp_path / "README").write_text("not ours")
    cache = DiskCache(str(tmp_path), 1000)
    assert not old.exists()
    name, data = some(0)
    cache.fill(name, 100, lambda: data)
    assert stored(tmp_path) == {}  # another worker may be writing the new one
    os.utime(new, (0, 0))
    assert DiskCache(str(tmp_path), 1000).fill(name, 100, lambda: data) == data
    assert stored(tmp_path).keys() == {name}
    assert (tmp_path / "README").exists()


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--data.cache-dir '.*/file/cache'"):
        DiskCache(str(tmp_path / "file" / "cache"), 1000)


def test_a_folder_that_goes_away_does_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = DiskCache(str(folder), 1000)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    name, data = some(0)
    assert cache.fill(name, 100, lambda: data) == data
    cache.discard(name)


def load(store: Store, disk: DiskCache | None, memory: int, count: int = 6) -> list[Batch]:
    loader = open_loader(store, disk, memory)
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def open_loader(store: Store, disk: DiskCache | None, memory: int) -> BatchLoader:
    order = SampleOrder(11, SIZES, 2)
    streams = ("latents", "maps")
    return BatchLoader(store, streams, order, global_batch=5, disk=disk, memory=memory)


def same(a: list[Batch], b: list[Batch]) -> None:
    for one, other in zip(a, b, strict=True):
        for stream, columns in one.columns.items():
            for name, values in columns.items():
                assert np.array_equal(values, other.columns[stream][name])


@pytest.mark.parametrize("memory", MEMORY)
def test_after_a_restart_nothing_is_asked_of_storage(
    known_store: Store, tmp_path: Path, memory: int
) -> None:
    expected = load(known_store, None, PLENTY)
    disk = DiskCache(str(tmp_path / "cache"), PLENTY)
    same(load(known_store, disk, memory), expected)
    same(load(known_store, disk, memory), expected)
    loader = open_loader(known_store, DiskCache(str(tmp_path / "cache"), PLENTY), memory)
    same(list(islice(loader, 6)), expected)
    loader.close()
    assert loader.bytes_read == {"latents": 0, "maps": 0}


@pytest.mark.parametrize("memory", MEMORY)
def test_corrupt_cached_files_are_fetched_again(
    known_store: Store, tmp_path: Path, memory: int
) -> None:
    folder = tmp_path / "cache"
    expected = load(known_store, DiskCache(str(folder), PLENTY), PLENTY)
    whole = {name: path.read_bytes() for name, path in stored(folder).items()}
    assert len(whole) == 6
    for number, path in enumerate(stored(folder).values()):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 3] if number % 2 else bytes(len(data)))
    same(load(known_store, DiskCache(str(folder), PLENTY), memory), expected)
    if memory:  # a loader that is closed fetches no more, so the next one completes the cache
        same(load(known_store, DiskCache(str(folder), PLENTY), memory), expected)
        assert {name: path.read_bytes() for name, path in stored(folder).items()} == whole


@pytest.mark.parametrize("memory", MEMORY)
def test_a_small_cache_shared_by_two_loaders_changes_nothing(
    known_store: Store, tmp_path: Path, memory: int
) -> None:
    folder = tmp_path / "cache"
    limit = 2 * known_store.record(0).streams["maps"][0].bytes
    expected = load(known_store, None, PLENTY, 12)
    with ThreadPoolExecutor(2) as pool:
        disks = [DiskCache(str(folder), limit) for _ in range(2)]
        found = list(pool.map(lambda disk: load(known_store, disk, memory, 12), disks))
    for batches in found:
        same(batches, expected)
    assert 0 <= sum(path.stat().st_size for path in stored(folder).values()) <= limit


def read_by_rows(store: Store, disk: DiskCache | None, steps: int) -> tuple[list[Batch], int]:
    """The batches with no memory for whole files, a step at a time; and the bytes read."""
    order = SampleOrder(11, SIZES, 2)
    loader = BatchLoader(
        store,
        ("latents", "maps"),
        order,
        global_batch=2,
        disk=disk,
        memory=0,
        prefetch=1,
        threads=1,
    )
    try:
        return list(islice(loader, steps)), sum(loader.bytes_read.values())
    finally:
        loader.close()


def bytes_of(store: Store) -> int:
    shards = [store.record(shard) for shard, samples in enumerate(SIZES) if samples]
    return sum(files[0].bytes for record in shards for files in record.streams.values())


EPOCH = sum(SIZES) // 2


def test_on_a_full_disk_files_are_not_fetched_again_for_their_rows(
    known_store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected, by_rows = read_by_rows(known_store, None, EPOCH)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    disk = DiskCache(str(tmp_path / "cache"), PLENTY)
    monkeypatch.setattr("pipeline.store.reading.disk_cache.os.replace", full)
    batches, read = read_by_rows(known_store, disk, EPOCH)
    same(batches, expected)
    assert stored(disk.folder) == {}
    largest = max(known_store.record(s).streams["maps"][0].bytes for s in range(len(SIZES)))
    assert read <= by_rows + 2 * largest  # one file in each of two windows, to see that it is full
    (said,) = capsys.readouterr().err.splitlines()
    assert all(word in said for word in (str(disk.folder), "No space left", "--data.cache-gb"))


def test_files_that_push_each_other_out_are_fetched_once_per_window(
    known_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, by_rows = read_by_rows(known_store, None, EPOCH)
    limit = known_store.record(0).streams["maps"][0].bytes
    disk = DiskCache(str(tmp_path / "cache"), limit)
    batches, read = read_by_rows(known_store, disk, EPOCH)
    same(batches, expected)
    assert read <= by_rows + bytes_of(known_store)
    (said,) = capsys.readouterr().err.splitlines()
    assert str(disk.folder) in said
    assert "cannot hold the files of a shuffle window" in said
    assert "raise --data.cache-gb" in said


def test_what_the_cache_can_hold_is_not_complained_about(
    known_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor a damaged file, which is not kept and not fetched whole again for its rows."""
    path = Path(known_store.root, known_store.record(0).streams["maps"][0].file)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # behind the last sample
    path.write_bytes(data)
    disk = DiskCache(str(tmp_path / "cache"), PLENTY)
    _, read = read_by_rows(known_store, disk, EPOCH)
    assert read <= bytes_of(known_store) + path.stat().st_size
    assert capsys.readouterr().err == ""
    assert len(stored(disk.folder)) == 5
