"""Stored arrays of a stream's columns: one sample's array to bytes and back. No pickle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numcodecs import Blosc, Zstd, blosc

from pipeline.storage.npz import npy_header
from pipeline.store.checksums import extend
from pipeline.store.codecs import MAIN, find_codec, part_name
from schemas.codecs import Lossless
from schemas.fields import element_count
from schemas.store import Checksum
from schemas.streams import Column

ZSTD_LEVEL = 1
"""Higher levels cost time and save nothing, because quantised numbers have few repetitions."""
SHUFFLED = {"cname": "zstd", "clevel": 1, "shuffle": Blosc.BITSHUFFLE}


Buffer = bytearray | memoryview


class StoredArray(NamedTuple):
    """One stored array of every sample of a stream."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """Shape of one sample."""
    lossless: Lossless
    is_class: bool
    """A class number, stored in tars as decimal text as WebDataset does."""
    trimmed: bool = False
    """Stored up to the last byte that is not 0; in zarr chunks, which are of equal shape, zstd
    removes the rest."""

    @property
    def nbytes(self) -> int:
        """Bytes of one sample, uncompressed."""
        return _nbytes(self.shape, self.dtype)


@lru_cache(maxsize=256)
def _nbytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return element_count(shape) * dtype.itemsize


def stream_parts(columns: Mapping[str, Column]) -> dict[str, StoredArray]:
    """The stored arrays of a stream by name, in the order of its columns."""
    return {
        part_name(name, array): part
        for name, column in columns.items()
        for array, part in _column_parts(column).items()
    }


def check_columns(columns: Mapping[str, Column]) -> None:
    """Raises ``ValueError`` when a column's codec does not support its shape, or when one of its
    arrays exceeds the limit of ``element_count``."""
    for name, column in columns.items():
        try:
            for part in _column_parts(column).values():
                element_count(part.shape)
        except ValueError as error:
            raise ValueError(f"column '{name}', codec {column.codec}: {error}") from None


def _column_parts(column: Column) -> dict[str, StoredArray]:
    is_class = column.codec == "int64" and column.shape == ()
    arrays = find_codec(column.codec).arrays(column.shape)
    return {
        name: StoredArray(
            array.dtype,
            array.shape,
            column.lossless if name == MAIN else "none",
            is_class,
            array.trimmed,
        )
        for name, array in arrays.items()
    }


def check_value(part: StoredArray, value: np.ndarray | int) -> np.ndarray:
    """The value as an array of the stored dtype. Raises ``ValueError`` for another shape, for a
    number that is not finite in that dtype, and for a label outside the range of readers."""
    if part.is_class and not 0 <= value < 10**MAX_CLASS_DIGITS:
        raise ValueError(f"{value} is not a class number")
    array = np.ascontiguousarray(value, dtype=part.dtype).reshape(np.shape(value))
    if array.shape != part.shape:
        raise ValueError(f"expected shape {part.shape}, got {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"a value is not finite in {array.dtype.name}")
    return array


def max_stored_size(part: StoredArray) -> int:
    """Upper bound of the stored bytes of one sample: incompressible data with a header."""
    return part.nbytes + part.nbytes // 64 + 4096


def compress(part: StoredArray, data: bytes | np.ndarray) -> bytes:
    """The stored bytes of an array's bytes."""
    if part.lossless == "zstd":
        return bytes(Zstd(level=ZSTD_LEVEL).encode(data))
    if part.lossless == "blosc":
        use_one_blosc_thread()
        return bytes(Blosc(**SHUFFLED).encode(data))
    return bytes(data)


def use_one_blosc_thread() -> None:
    """Compress in the calling thread, because two writers of one shard must make equal bytes, and
    those of several threads differ from call to call. The setting belongs to the process: any
    library may have changed it."""
    blosc.use_threads = False


def decompress(
    part: StoredArray, data: bytes | memoryview, size: int, out: np.ndarray | None = None
) -> bytes | memoryview:
    """The ``size`` uncompressed bytes, in ``out`` (uint8) if given and ``data`` is compressed.

    Raises ``ValueError`` when the data are damaged or hold another number of bytes. At most
    ``size`` bytes are allocated, whatever size the data declare.
    """
    if part.lossless == "none":
        if len(data) != size:
            raise ValueError(f"it holds {len(data)} bytes, not {size}")
        return data
    if _stored_size(part.lossless, data) != size:
        raise ValueError(f"its compressed form does not hold {size} bytes")
    out = np.empty(size, np.uint8) if out is None else out
    codec = Zstd() if part.lossless == "zstd" else Blosc()
    try:
        codec.decode(data, out=out)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot be decompressed ({error})") from None
    return out.data


TRIMMED_HEADER = len(npy_header((0,)))
"""Bytes of the .npy header of any trimmed array: numpy leaves room for a longer length."""
_HEADER_BEGIN = npy_header((0,)).partition(b"(0,)")[0]


def trimmed_header(largest: int, size: int) -> bytes:
    """The .npy header of a trimmed array of at most ``largest`` bytes that is stored in ``size``
    bytes with it. Raises ``ValueError`` where no sample has this size."""
    if not TRIMMED_HEADER <= size <= TRIMMED_HEADER + largest:
        raise ValueError(f"it holds {size} bytes; at most {TRIMMED_HEADER + largest} fit")
    text = b"%b(%d,), }" % (_HEADER_BEGIN, size - TRIMMED_HEADER)
    return text.ljust(TRIMMED_HEADER - 1) + b"\n"  # as numpy writes it, in a tenth of the time


def npy_member(part: StoredArray, array: np.ndarray) -> bytes:
    """A value as a tar member: decimal text, or a .npy file, compressed if the part is."""
    if part.is_class:
        return str(int(array)).encode()
    if part.trimmed:
        data = array.tobytes().rstrip(b"\0")
        return compress(part, trimmed_header(part.nbytes, TRIMMED_HEADER + len(data)) + data)
    return compress(part, npy_header(part.shape, part.dtype.str) + array.tobytes())


def member_suffix(name: str, part: StoredArray) -> str:
    """``mean.npy``, ``mean.npy.zst`` or ``mean.npy.blosc``; ``cls`` for a class number."""
    if part.is_class:
        return "cls"
    return f"{name}.npy" if part.lossless == "none" else f"{name}.npy.{SUFFIXES[part.lossless]}"


SUFFIXES: dict[Lossless, str] = {"zstd": "zst", "blosc": "blosc"}

MAX_CLASS_DIGITS = 18
"""Digits of a class number that always fit into an int64."""


def read_npy_member(part: StoredArray, data: bytes | memoryview) -> np.ndarray | int:
    """The inverse of ``npy_member``; an array may be a view of ``data``. Raises ``ValueError`` when
    the bytes are not what the manifest declares."""
    if part.is_class:
        text = bytes(data)
        if not text.isdigit() or len(text) > MAX_CLASS_DIGITS:
            raise ValueError(f"{text[:20]!r} is not a class number")
        return int(text)
    if part.trimmed:
        return _read_trimmed(part, data)
    header = npy_header(part.shape, part.dtype.str)
    plain = decompress(part, data, len(header) + part.nbytes)
    if bytes(plain[: len(header)]) != header:
        raise ValueError(f"not a {part.dtype.name} array of shape {part.shape}")
    return np.frombuffer(plain, part.dtype, offset=len(header)).reshape(part.shape)


def _read_trimmed(part: StoredArray, data: bytes | memoryview) -> np.ndarray:
    if part.lossless != "none":
        size = _stored_size(part.lossless, data) or 0
        data = decompress(part, data, min(size, part.nbytes + TRIMMED_HEADER))
    header = trimmed_header(part.nbytes, len(data))
    if len(data) < len(header) or bytes(data[: len(header)]) != header:
        raise ValueError(f"not a {part.dtype.name} array of at most {part.nbytes} numbers")
    whole = np.zeros(part.nbytes, np.uint8)
    whole[: len(data) - len(header)] = np.frombuffer(data, np.uint8, offset=len(header))
    return whole


def read_chunk(part: StoredArray, data: bytes | memoryview) -> np.ndarray:
    """The inverse of ``compress`` for an array's bytes without header, as zarr stores them."""
    plain = decompress(part, data, part.nbytes)
    return np.frombuffer(plain, part.dtype).reshape(part.shape)


def fill_from_npy_member(part: StoredArray, data: bytes | memoryview, rows: np.ndarray) -> None:
    """``read_npy_member`` into the one row of ``rows``, (1, *shape)."""
    rows[0] = read_npy_member(part, data)


def fill_from_chunk(part: StoredArray, data: bytes | memoryview, rows: np.ndarray) -> None:
    """``read_chunk`` into the one row of ``rows``, (1, *shape); a tenth faster than copying."""
    if part.lossless == "none":
        rows[0] = read_chunk(part, data)
    else:
        decompress(part, data, part.nbytes, rows.reshape(-1).view(np.uint8))


class ArrayReader:
    """Reads one stored array of a sample from its file into its row of a batch."""

    def __init__(self, part: StoredArray, *, npy: bool) -> None:
        """``npy``: the array is a tar member; otherwise a zarr chunk."""
        if part.trimmed and not npy:
            part = part._replace(lossless="zstd")
        self.part = part
        self.is_text = npy and part.is_class
        self.is_trimmed = part.trimmed and part.lossless == "none"
        self.header = (
            npy_header(part.shape, part.dtype.str)
            if npy and not (part.is_class or part.trimmed)
            else b""
        )
        self.stored_size: int | None = None
        """Bytes of header and uncompressed numbers; None for compressed arrays and text."""
        if part.lossless == "none" and not self.is_text and not part.trimmed:
            self.stored_size = len(self.header) + part.nbytes
        self._fill = fill_from_npy_member if npy else fill_from_chunk

    def targets(self, out: np.ndarray) -> Callable[[int, int], list[Buffer]]:
        """``(place, size) -> buffers`` to read ``size`` stored bytes of the row at ``place`` of a
        batch's array (B, *shape), contiguous. Uncompressed numbers are read straight into it."""
        header, nbytes = len(self.header), self.part.nbytes
        flat = out.reshape(-1).view(np.uint8).data  # cheaper to slice than an array

        def buffers(place: int, size: int) -> list[Buffer]:
            if size != self.stored_size:
                return [bytearray(size)]
            data = flat[place * nbytes : (place + 1) * nbytes]
            return [bytearray(header), data] if header else [data]

        return buffers

    def fill(self, data: bytes | memoryview, row: np.ndarray) -> None:
        """Decode stored bytes into ``row``. Raises ``ValueError`` when they are damaged."""
        self._fill(self.part, data, row)

    def finish(self, buffers: Sequence[Buffer], out: np.ndarray, place: int) -> None:
        """The same, from ``buffers`` of ``targets`` after they have been read."""
        first = buffers[0]
        if len(buffers) == 1 and isinstance(first, bytearray):
            self.fill(memoryview(first), out[place : place + 1])
        elif self.header and bytes(first) != self.header:
            raise ValueError(f"not a {self.part.dtype.name} array of shape {self.part.shape}")


def check_stored(
    buffers: Sequence[Buffer], count: int, size: int, expected: int | None, checksum: Checksum
) -> None:
    """Raises ``ValueError`` when ``count`` bytes were read instead of ``size``, or when the bytes
    in the buffers do not have the checksum ``expected`` (None: it is not checked)."""
    if count != size:
        raise ValueError("the file is too short")
    if expected is None:
        return
    found = 0
    for buffer in buffers:
        found = extend(checksum, found, buffer)
    if found != expected:
        raise ValueError("its checksum is wrong")


Allocate = Callable[[int], np.ndarray]
"""Number of bytes -> uninitialised uint8 array of that length. Raises ``MemoryError``."""


def allocate(nbytes: int) -> np.ndarray:
    """Pageable host memory."""
    return np.empty(nbytes, np.uint8)


def empty_batch(part: StoredArray, count: int, allocate: Allocate = allocate) -> np.ndarray:
    """A contiguous array for ``count`` samples, in the stored dtype."""
    return allocate(count * part.nbytes).view(part.dtype).reshape(count, *part.shape)


def _stored_size(lossless: Lossless, data: bytes | memoryview) -> int | None:
    """The uncompressed size that a compressed block declares; None if it is not such a block."""
    head = bytes(data[:18])
    if lossless == "blosc":  # four bytes of flags, then nbytes, blocksize and cbytes
        whole = len(head) >= 16 and int.from_bytes(head[12:16], "little") == len(data)
        return int.from_bytes(head[4:8], "little") if whole else None
    # RFC 8878, section 3.1.1: magic number, frame header descriptor, ..., frame content size
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = head[4]
    single_segment = bool(descriptor & 0x20)
    width = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    start = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[descriptor & 3]
    if not width or len(head) < start + width:
        return None
    size = int.from_bytes(head[start : start + width], "little")
    return size + 256 if width == 2 else size
