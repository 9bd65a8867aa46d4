"""One value to bytes and back."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.store.columns import decode, empty_batch, encode, member_suffix
from schemas.store import Column

Codec = Literal["float16", "float32"]
CLASS = Column(shape=(), codec="int64")


@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (2, 3, 5, 7), (0, 3)])
@pytest.mark.parametrize("codec", ["float16", "float32"])
def test_arrays_come_back_bit_for_bit_and_are_plain_npy(
    shape: tuple[int, ...], codec: Codec
) -> None:
    column = Column(shape=shape, codec=codec)
    value = np.asarray(np.random.default_rng(0).standard_normal(shape), dtype=codec)
    data = encode(column, value)
    found = decode(column, data)
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (value.dtype, shape)
    assert np.array_equal(found, value)
    assert np.array_equal(np.load(io.BytesIO(data), allow_pickle=False), value)
    assert member_suffix("x", column) == "x.npy"


def test_memory_layout_does_not_change_the_bytes() -> None:
    column = Column(shape=(3, 4), codec="float32")
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert encode(column, np.asfortranarray(value)) == encode(column, value)
    assert encode(column, value.astype(">f4")) == encode(column, value)


@pytest.mark.parametrize("label", [0, 7, np.int64(999), 10**18 - 1])
def test_classes_are_decimal_text(label: int) -> None:
    data = encode(CLASS, label)
    assert data == str(int(label)).encode()
    assert decode(CLASS, data) == label
    assert member_suffix("label", CLASS) == "cls"


@pytest.mark.parametrize("label", [-1, 10**18])
def test_classes_that_could_not_be_read_are_not_written(label: int) -> None:
    with pytest.raises(ValueError, match="not a class number"):
        encode(CLASS, label)


@pytest.mark.parametrize("data", [b"", b"-1", b"1.5", b"dog", b"9" * 19, b" 1"])
def test_what_is_no_class_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a class number"):
        decode(CLASS, data)


@pytest.mark.parametrize(
    "other",
    [
        Column(shape=(4, 3), codec="float16"),
        Column(shape=(3, 4), codec="float32"),
        Column(shape=(12,), codec="float16"),
    ],
)
def test_other_arrays_than_promised_are_refused(other: Column) -> None:
    column = Column(shape=(3, 4), codec="float16")
    with pytest.raises(ValueError, match="not a float16 array of shape"):
        decode(column, encode(other, np.zeros(other.shape)))


def test_pickled_and_mangled_arrays_are_refused() -> None:
    column = Column(shape=(2,), codec="float16")
    good = encode(column, np.zeros(2))
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}, None], dtype=object), allow_pickle=True)
    for data in (buffer.getvalue(), good[:-1], good + b"\0", b"", good[4:]):
        with pytest.raises(ValueError, match="not a float16 array"):
            decode(column, data)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65520.0, -1e9])
def test_numbers_that_float16_cannot_hold_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite in float16"):
        encode(Column(shape=(2,), codec="float16"), np.array([0, value], dtype=np.float32))


def test_the_largest_float16_is_kept() -> None:
    column = Column(shape=(1,), codec="float16")
    assert decode(column, encode(column, np.array([65504.0]))) == 65504


def test_absurd_shapes_are_refused_before_allocation() -> None:
    for shape in [(1 << 16, 1 << 16), (1 << 40,), (-1,)]:
        with pytest.raises(ValidationError):
            Column(shape=shape, codec="float16")
    unchecked: Any = Column.model_construct(shape=(1 << 20, 1 << 20), codec="float16")
    with pytest.raises(ValueError, match="limit"):
        empty_batch(unchecked, 1)
