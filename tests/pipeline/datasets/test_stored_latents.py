"""Means and stds in untrusted .npy files."""

from __future__ import annotations

import contextlib
import io
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest

from pipeline.datasets.crop import BadImageError
from pipeline.datasets.stored_latents import parse_moments
from tests.repa import npy


def moments(channels: int = 4, side: int = 8) -> np.ndarray:
    rng = np.random.default_rng(0)
    mean = rng.standard_normal((channels, side, side))
    return np.concatenate([mean, np.abs(mean) / 10]).astype(np.float32)


def header(**changes: Any) -> bytes:
    """The header of ``moments()`` with changes."""
    buffer = io.BytesIO()
    values = {"descr": "<f4", "fortran_order": False, "shape": (8, 8, 8), **changes}
    np.lib.format.write_array_header_1_0(buffer, values)
    return buffer.getvalue()


def changed(where: tuple[int, int, int], value: float) -> bytes:
    array = moments()
    array[where] = value
    return npy(array)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2"])
@pytest.mark.parametrize("channels", [4, 16])
def test_numbers_are_those_of_the_file(dtype: str, channels: int) -> None:
    array = moments(channels).astype(dtype)
    found = parse_moments(npy(array))
    assert found.dtype == np.float32
    assert np.array_equal(found, array)


def test_any_layout_that_numpy_writes_is_read() -> None:
    array = moments()
    second = io.BytesIO()
    np.lib.format.write_array(second, array, version=(2, 0))
    for data in (npy(np.asfortranarray(array)), npy(array[None]), second.getvalue()):
        assert np.array_equal(parse_moments(data), array)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "is not a .npy file"),
        (b"\x93NUMPY", "is not a .npy file"),
        (b"PK\x03\x04" + bytes(500), "is not a .npy file"),
        (pickle.dumps([1, 2]), "is not a .npy file"),
        (npy(moments())[:100], "is not a .npy file"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "is not a .npy file"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 99, "is not a .npy file"),
        (b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10000, "is not a .npy file"),
        (npy(moments())[:-1], "holds 2047 bytes of numbers, its header promises 2048"),
        (npy(moments()) + b"x", "holds 2049 bytes of numbers, its header promises 2048"),
        (npy(np.array([{}], dtype=object)), "holds pickled objects"),
        (header(descr="|O", shape=(2, 1, 1)) + bytes(16), "holds pickled objects"),
        (npy(moments().astype(np.float64)), "holds float64 numbers"),
        (npy(moments().astype(np.int32)), "holds int32 numbers"),
        (npy(moments()[:7]), r"has shape \(7, 8, 8\)"),
        (npy(moments()[0]), r"has shape \(8, 8\)"),
        (npy(np.zeros((0, 8, 8), np.float32)), r"has shape \(0, 8, 8\)"),
        (header(shape=(-2, -4, 8)) + bytes(256), "has shape"),
        (header(shape=(2 << 40, 1 << 40, 1 << 40)), "its header promises"),
        (header(shape=(8, 1 << 15, 1 << 15)) + bytes(2048), "its header promises"),
        (changed((0, 0, 0), np.nan), "not finite or above 65504"),
        (changed((7, 0, 0), np.nan), "not finite or above 65504"),
        (changed((1, 2, 3), -np.inf), "not finite or above 65504"),
        (changed((1, 2, 3), 70000), "not finite or above 65504"),
        (changed((4, 0, 0), -1e-3), "not standard deviations"),
    ],
)
@pytest.mark.filterwarnings("ignore:Reading `.npy`")
def test_anything_else_is_refused_and_nothing_large_is_allocated(
    data: bytes, complaint: str
) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadImageError, match=complaint) as error:
            parse_moments(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Reading `.npy`")
def test_no_damage_raises_anything_else() -> None:
    rng = np.random.default_rng(1)
    whole = bytearray(npy(moments()))
    for _ in range(500):
        data = bytearray(whole)
        for position in rng.integers(0, 128, 3):
            data[position] = rng.integers(256)
        with contextlib.suppress(BadImageError):
            assert parse_moments(bytes(data)).dtype == np.float32
