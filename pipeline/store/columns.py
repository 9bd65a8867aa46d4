"""One column of one sample as the bytes of one tar member, and back. No pickle in either way."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np

from schemas.fields import element_count
from schemas.store import Column

DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "int64": np.dtype("<i8"),
    "uint8": np.dtype("|u1"),
}


def member_suffix(name: str, column: Column) -> str:
    """``mean.npy``; integers without a shape are class numbers in WebDataset's way, ``cls``."""
    return "cls" if _is_class(column) else f"{name}.npy"


def encode(column: Column, value: np.ndarray | int) -> bytes:
    """The member's bytes. Raises ``ValueError`` on another shape or a number that does not fit."""
    if _is_class(column):
        if not 0 <= value < 10**18:
            raise ValueError(f"{value} is not a class number")
        return str(int(value)).encode()
    array = np.asarray(value, dtype=DTYPES[column.codec])
    if array.shape != column.shape:
        raise ValueError(f"expected shape {column.shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"a value is not finite in {column.codec}")
    return npy_header(column.shape, column.codec) + array.tobytes()


def decode(column: Column, data: bytes | memoryview) -> np.ndarray | int:
    """One member's bytes to its value; an array is a view of ``data``.

    Raises ``ValueError`` where the bytes are not what the manifest promises.
    """
    if _is_class(column):
        text = bytes(data)
        if not text.isdigit() or len(text) > 18:
            raise ValueError(f"{text[:20]!r} is not a class number")
        return int(text)
    header = npy_header(column.shape, column.codec)
    size = element_count(column.shape) * DTYPES[column.codec].itemsize
    if len(data) != len(header) + size or bytes(data[: len(header)]) != header:
        raise ValueError(f"not a {column.codec} array of shape {column.shape}")
    values = np.frombuffer(data, DTYPES[column.codec], offset=len(header))
    return values.reshape(column.shape)


def empty_batch(column: Column, count: int) -> np.ndarray:
    """A contiguous array for ``count`` samples, in the stored dtype."""
    element_count(column.shape)
    return np.empty((count, *column.shape), DTYPES[column.codec])


@lru_cache(maxsize=256)
def npy_header(shape: tuple[int, ...], codec: str) -> bytes:
    """The header of a .npy file (version 1.0) of this shape and dtype."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": DTYPES[codec].str, "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def _is_class(column: Column) -> bool:
    return column.codec == "int64" and column.shape == ()
