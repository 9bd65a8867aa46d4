"""Files that the loader keeps open during their shuffle window."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipeline.storage.local import LocalFile
from pipeline.store import BatchLoader, SampleOrder, Store
from pipeline.store.reading.stream_reader import DamagedShardError
from tests.helpers import SIZES, known_values, recorded_opens, write_known_store

STREAM = "maps"
BATCH = 3


def descriptors(root: Path | str) -> list[str]:
    """Paths below ``root`` that this process has open."""
    paths = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            paths.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(path for path in paths if path.startswith(str(root)))


@pytest.fixture(scope="module")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """40 files of each stream."""
    return write_known_store(str(tmp_path_factory.mktemp("many")), (BATCH,) * 40)


@contextmanager
def loading(
    store: Store, window: int = 1, threads: int = 2, sizes: Sequence[int] = SIZES
) -> Iterator[BatchLoader]:
    order = SampleOrder(11, sizes, window)
    loader = BatchLoader(store, [STREAM], order, global_batch=BATCH, threads=threads)
    try:
        yield loader
    finally:
        loader.close()


def check(loader: BatchLoader, steps: int, window: int = 1, sizes: Sequence[int] = SIZES) -> None:
    order = SampleOrder(11, sizes, window)
    for batch in islice(loader, steps):
        shards, rows = order.locate(batch.positions)
        places = zip(shards.tolist(), rows.tolist(), strict=True)
        expected = [known_values(*place)[STREAM] for place in places]
        for name, array in batch.columns[STREAM].items():
            assert np.array_equal(array, np.stack([values[name] for values in expected]))


@pytest.mark.parametrize("threads", [1, 8])
def test_a_file_is_opened_once_in_a_window(known_store: Store, threads: int) -> None:
    with recorded_opens() as paths:
        with loading(known_store, window=len(SIZES), threads=threads) as loader:
            check(loader, sum(SIZES) // BATCH, len(SIZES))
        opened = [path for path in paths if f"/{STREAM}/" in path]
    stored = {f"shard-{number:06d}.tar" for number, size in enumerate(SIZES) if size}
    assert {Path(path).name for path in opened} == stored
    assert len(opened) <= 2 * len(SIZES)  # those of the next epoch, which is read ahead, again
    assert loader.opens[STREAM] == len(opened)
    assert not descriptors(known_store.root)


def test_no_more_than_the_limit_stay_open(
    many_files: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.store.reading.file_source.MAX_OPEN_FILES", 1)
    sizes = (BATCH,) * 40
    with loading(many_files, window=40, sizes=sizes) as loader:
        check(loader, 20, 40, sizes)
        assert len(descriptors(many_files.root)) <= 3  # one, and one of each thread for a moment
    assert not descriptors(many_files.root)


def test_windows_that_have_ended_are_closed(many_files: Store) -> None:
    sizes = (BATCH,) * 40
    with loading(many_files, sizes=sizes) as loader:
        check(loader, 30, 1, sizes)
        assert len(descriptors(many_files.root)) <= 10  # those of batches that are read ahead


def test_a_stale_handle_is_opened_again(
    known_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS answers where a file was replaced on the server."""
    preadv, stale = os.preadv, [2, 5]

    def read(*args: object) -> int:
        stale[:] = [count - 1 for count in stale]
        if 0 in stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return preadv(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr("pipeline.storage.retry.FIRST_DELAY", 0.001)
    with loading(known_store, window=len(SIZES), threads=1) as loader:
        check(loader, 6, len(SIZES))
    assert max(stale) < 0


def test_a_flipped_bit_is_found_in_a_file_that_is_open(known_store: Store) -> None:
    """Each row is verified when it is first read, not when its file is opened."""
    with loading(known_store, window=len(SIZES), threads=1) as loader:
        batches = iter(loader)
        next(batches)
        for path in Path(known_store.root, STREAM).iterdir():
            with path.open("r+b") as file:
                data = bytearray(file.read())
                for at in range(0, len(data), 16):
                    data[at] ^= 1
                file.seek(0)
                file.write(data)
        with pytest.raises(DamagedShardError, match=f"stream '{STREAM}', shard .* is damaged: sa"):
            list(islice(batches, 8))


def test_what_is_not_a_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        assert LocalFile(str(path)).descriptor is None
    with pytest.raises(FileNotFoundError):
        LocalFile(str(tmp_path / "none"))
    assert not descriptors(tmp_path)
