"""Compressed bytes do not depend on the thread that makes them, nor on Blosc's threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numcodecs import blosc

from pipeline.store.arrays import StoredArray, compress
from pipeline.store.zarr_writer import _shard_bytes
from schemas.codecs import Lossless

TIMES = 10


@pytest.fixture(params=[None, True])
def many_blosc_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """As another library may have set it; None is numcodecs' default: several, if the main thread
    calls."""
    before, threads = blosc.use_threads, blosc.get_nthreads()
    blosc.use_threads = request.param
    blosc.set_nthreads(4)
    yield
    blosc.use_threads = before
    blosc.set_nthreads(threads)


def as_tar_member(part: StoredArray, values: np.ndarray) -> bytes:
    return compress(part, values[0])


def as_zarr_shard(part: StoredArray, values: np.ndarray) -> bytes:
    return _shard_bytes(part, values, shard_size=2)


@pytest.mark.usefixtures("many_blosc_threads")
@pytest.mark.parametrize("lossless", ["zstd", "blosc"])
@pytest.mark.parametrize("make", [as_tar_member, as_zarr_shard])
def test_main_and_worker_threads_make_equal_bytes(
    make: Callable[[StoredArray, np.ndarray], bytes], lossless: Lossless
) -> None:
    part = StoredArray(np.dtype(np.float16), (1 << 19,), lossless, is_class=False)
    values = np.random.default_rng(0).standard_normal((2, 1 << 19)).astype(np.float16)
    made = {make(part, values) for _ in range(TIMES)}
    with ThreadPoolExecutor(4) as pool:
        made |= set(pool.map(lambda _: make(part, values), range(TIMES)))
    assert len(made) == 1
