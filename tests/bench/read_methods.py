"""Methods of reading a complete store, ours and stock ones. Each returns the samples read."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import webdataset
import zarr
from numcodecs import Zstd

from pipeline.storage.files import is_local, list_tree
from pipeline.store import SampleOrder, Store, StreamReader
from tests.bench.synthetic_stores import all_rows

BATCH = 32
WINDOW = 8
ZARR_ROWS = 64
"""Samples that are read one at a time through stock zarr."""
BUFFER = 1 << 20
WHOLE = 1 << 40


class ReadMethod(NamedTuple):
    name: str
    read: Callable[[Store], int]
    baseline: bool = False
    """True for the method that the others are compared with."""


def read_methods(store: Store) -> list[ReadMethod]:
    """Methods that can read this store. The first one is the baseline."""
    local = is_local(store.filesystem)
    methods = [
        ReadMethod("cat > /dev/null", cat, True)
        if local
        else ReadMethod("GET of whole objects", get, True)
    ]
    if local:
        methods.append(ReadMethod("open and readinto", readinto))
    methods += [
        ReadMethod("reader, whole files, in order", lambda s: ours(s, WHOLE, shuffled=False)),
        ReadMethod("reader, whole files, shuffled", lambda s: ours(s, WHOLE, shuffled=True)),
        ReadMethod("reader, ranges, in order", lambda s: ours(s, 0, shuffled=False)),
        ReadMethod("reader, ranges, shuffled", lambda s: ours(s, 0, shuffled=True)),
    ]
    if store.manifest.format == "zarr":
        methods.append(ReadMethod("stock zarr, whole shards", stock_zarr_shards))
        methods.append(ReadMethod("stock zarr, shuffled rows", stock_zarr_rows))
    elif local or shutil.which("curl"):
        methods.append(ReadMethod("stock webdataset .decode()", stock_webdataset))
    return methods


def data_files(store: Store) -> list[str]:
    """Sorted paths of the files that hold samples."""
    paths = []
    for name in store.manifest.streams:
        paths += list_tree(store.filesystem, f"{store.root}/{name}")
    return sorted(path for path in paths if path.endswith(".tar") or "/c/" in path)


def cat(store: Store) -> int:
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *data_files(store)], stdout=nowhere, check=True)
    return samples_of(store)


def readinto(store: Store) -> int:
    buffer = bytearray(BUFFER)
    for path in data_files(store):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return samples_of(store)


def get(store: Store) -> int:
    for path in data_files(store):
        store.filesystem.cat_file(path)
    return samples_of(store)


def ours(store: Store, whole_file_limit: int, *, shuffled: bool) -> int:
    """Read both streams with checksums, as a run before the termination does."""
    fresh = Store.open(store.url)
    readers = [
        StreamReader(fresh, name, whole_file_limit=whole_file_limit, cache_files=WINDOW)
        for name in fresh.manifest.streams
    ]
    shards, rows = all_rows(fresh.manifest)
    if shuffled:
        sizes = [fresh.manifest.shard_size] * fresh.manifest.num_shards
        shards, rows = SampleOrder(0, sizes, WINDOW).locate(np.arange(len(rows)))
    for start in range(0, len(rows), BATCH):
        for reader in readers:
            reader.read(shards[start : start + BATCH], rows[start : start + BATCH])
    return len(rows)


def stock_webdataset(store: Store) -> int:
    """Read and decode the tars of every stream; ``.npy.zst`` needs a handler that is not stock."""
    urls = data_files(store)
    if not is_local(store.filesystem):  # webdataset fetches http URLs with curl
        urls = [store.filesystem.sign(path, expiration=600) for path in urls]
    read = 0
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    for sample in dataset.decode(unpack_zst):
        read += any(key.startswith("mean.") for key in sample)
    return read


def unpack_zst(key: str, data: bytes) -> Any:
    """Handler for ``WebDataset.decode``; None leaves a member to the next handler."""
    if not key.endswith(".npy.zst"):
        return None
    return np.load(io.BytesIO(Zstd().decode(data)))


def stock_zarr_shards(store: Store) -> int:
    size = store.manifest.shard_size
    for array in _arrays(store):
        for start in range(0, array.shape[0], size):
            array[start : start + size]
    return samples_of(store)


def stock_zarr_rows(store: Store) -> int:
    rows = np.random.default_rng(0).permutation(samples_of(store))[:ZARR_ROWS]
    arrays = list(_arrays(store))
    for row in rows:
        for array in arrays:
            array[row]
    return len(rows)


def samples_of(store: Store) -> int:
    return store.manifest.num_shards * store.manifest.shard_size


def _arrays(store: Store) -> Iterator[Any]:
    group = zarr.open_group(store.url, mode="r")
    for name in store.manifest.streams:
        yield from (array for _, array in group[name].arrays())
