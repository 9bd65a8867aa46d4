"""One stored array of one sample to bytes and back."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numcodecs import Blosc, Zstd
from pydantic import ValidationError

from pipeline.storage.npz import npy_header
from pipeline.store.arrays import (
    StoredArray,
    check_value,
    compress,
    empty_batch,
    member_suffix,
    npy_member,
    read_chunk,
    read_npy_member,
    stream_parts,
)
from schemas.streams import Column

CLASS = stream_parts({"label": Column(shape=(), codec="int64")})["label"]


def part(shape: tuple[int, ...], dtype: str = "<f2", lossless: Any = "none") -> StoredArray:
    return StoredArray(np.dtype(dtype), shape, lossless, is_class=False)


@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (2, 3, 5, 7), (0, 3)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "|u1", "<u2"])
@pytest.mark.parametrize("lossless", ["none", "zstd", "blosc"])
def test_arrays_come_back_bit_for_bit(shape: tuple[int, ...], dtype: str, lossless: str) -> None:
    if lossless != "none" and 0 in shape:
        pytest.skip("nothing to compress")
    kind = part(shape, dtype, lossless)
    value = check_value(kind, (np.random.default_rng(0).random(shape) * 100).astype(dtype))
    member = npy_member(kind, value)
    for found in (read_npy_member(kind, member), read_chunk(kind, compress(kind, value.tobytes()))):
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (value.dtype, shape)
        assert np.array_equal(found, value)
    plain = {"none": bytes, "zstd": Zstd().decode, "blosc": Blosc().decode}[lossless](member)
    assert np.array_equal(np.load(io.BytesIO(plain), allow_pickle=False), value)


def test_names_tell_what_is_in_a_member() -> None:
    assert member_suffix("x", part((3,))) == "x.npy"
    assert member_suffix("x.step", part((3,), lossless="zstd")) == "x.step.npy.zst"
    assert member_suffix("x", part((3,), lossless="blosc")) == "x.npy.blosc"
    assert member_suffix("label", CLASS) == "cls"


def test_memory_layout_does_not_change_the_bytes() -> None:
    kind = part((3, 4), "<f4")
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = npy_member(kind, check_value(kind, value))
    assert npy_member(kind, check_value(kind, np.asfortranarray(value))) == expected
    assert npy_member(kind, check_value(kind, value.astype(">f4"))) == expected


@pytest.mark.parametrize("label", [0, 7, np.int64(999), 10**18 - 1])
def test_classes_are_decimal_text(label: int) -> None:
    data = npy_member(CLASS, check_value(CLASS, label))
    assert data == str(int(label)).encode()
    assert read_npy_member(CLASS, data) == label


@pytest.mark.parametrize("label", [-1, 10**18])
def test_classes_that_could_not_be_read_are_not_written(label: int) -> None:
    with pytest.raises(ValueError, match="not a class number"):
        check_value(CLASS, label)


@pytest.mark.parametrize("data", [b"", b"-1", b"1.5", b"dog", b"9" * 19, b" 1"])
def test_what_is_no_class_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a class number"):
        read_npy_member(CLASS, data)


def test_other_shapes_and_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(3,\), got \(2,\)"):
        check_value(part((3,)), np.zeros(2))
    with (
        pytest.raises(ValueError, match="not finite in float16"),
        pytest.warns(RuntimeWarning, match="overflow"),
    ):
        check_value(part((2,)), np.array([1.0, 1e6]))
    with pytest.raises(ValueError, match="not finite"):
        check_value(part((2,)), np.array([1.0, np.nan]))


def test_an_object_array_is_refused_without_being_unpickled() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="bytes"):
        read_npy_member(part((1,)), buffer.getvalue())


@pytest.mark.parametrize("change", ["short", "long", "shape", "dtype", "fortran"])
def test_bytes_of_another_array_are_refused(change: str) -> None:
    kind = part((4, 2))
    data = bytearray(npy_member(kind, np.zeros((4, 2), np.float16)))
    header = bytes(npy_header((4, 2), "<f2"))
    if change == "short":
        data = data[:-1]
    elif change == "long":
        data += b"x"
    else:
        old, new = {
            "shape": (b"(4, 2)", b"(2, 4)"),
            "dtype": (b"<f2", b"<i2"),
            "fortran": (b"False", b"True "),
        }[change]
        assert old in header
        data[: len(header)] = header.replace(old, new)
    with pytest.raises(ValueError, match=r"not a float16 array|bytes, not"):
        read_npy_member(kind, bytes(data))


@pytest.mark.parametrize("lossless", ["zstd", "blosc"])
@pytest.mark.parametrize("read", [read_npy_member, read_chunk])
def test_damaged_or_other_compressed_blocks_are_refused(lossless: str, read: Any) -> None:
    kind = part((40, 20), "<f4", lossless)
    value = np.random.default_rng(0).integers(0, 9, (40, 20)).astype("<f4")
    size = 0 if read is read_chunk else len(npy_header((40, 20), "<f4"))
    plain = b"\0" * size + value.tobytes()
    good = compress(kind, plain)
    bomb = compress(kind, bytes(1 << 26))  # says it holds 64 MiB, and does
    shorter = compress(kind, plain[:-4])
    for data in (b"", b"x", good[:10], good[:-3], bomb, shorter, bytes(len(good)), b"\xff" * 400):
        with pytest.raises(ValueError, match=r"compressed form|decompressed"):
            read(kind, data)


def test_a_batch_is_bounded_before_it_is_allocated() -> None:
    assert empty_batch(part((2, 3), "|u1"), 5).shape == (5, 2, 3)
    with pytest.raises(ValueError, match="the limit is"):
        empty_batch(part((1 << 20, 1 << 20)), 1)
    with pytest.raises(ValidationError, match="the limit is"):
        Column(shape=(1 << 20, 1 << 20), codec="uint8")
