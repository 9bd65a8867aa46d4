"""Reading untrusted .npz files in blocks, without pickle, and writing .npz files of images."""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from pipeline.storage.files import is_local, open_url, redact
from pipeline.storage.redaction import without_secrets
from schemas.errors import UserError, plain_text

MAX_HEADER = 1 << 14
"""Bytes of an array's header; numpy itself refuses more than 10000."""
MAX_BLOCK = 256 << 20
"""Bytes of one block, or of a single longer row. The limit is needed because the writer of a file
decides how far its compressed data expand."""
MAX_ABOUT = 1 << 22
"""Bytes of a file's metadata."""
ABOUT = "about"
"""Member with the metadata as JSON: run and step of samples, network of features."""
PARSE_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, OverflowError),
    *(SyntaxError, TokenError, RecursionError, MemoryError),
)
"""Raised for damaged headers, because a .npy header is parsed as Python source."""
PIECE = 1 << 20
"""Bytes that are decompressed at a time into a block."""


def fitting_rows(rows: int, bytes_of_one: int) -> int:
    """Number of rows, at most ``rows``, that fit into ``MAX_BLOCK`` bytes; at least one."""
    return min(rows, max(1, MAX_BLOCK // max(1, bytes_of_one)))


class Header(NamedTuple):
    """The header of a .npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    offset: int
    """Bytes before the numbers."""


class _LimitedReader:
    """Reads at most ``MAX_HEADER`` bytes, because numpy reads as many as a header promises."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.count = 0

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= MAX_HEADER - self.count:
            raise ValueError("the header is too long")
        data = self.file.read(size)
        self.count += len(data)
        return data


def read_npy_header(file: IO[bytes]) -> Header:
    """Read the header of a .npy file, version 1.0 or 2.0. Raises ``ValueError`` for anything else.

    Only its form is checked: sizes may be negative, or promise more bytes than ``file`` holds.
    """
    reader = _LimitedReader(file)
    try:
        version = npy.read_magic(reader)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran_order, dtype = read(reader)
    except PARSE_ERRORS as error:
        raise ValueError(f"not a .npy header ({type(error).__name__})") from None
    return Header(shape, dtype, fortran_order, reader.count)


class Archive:
    """An .npz at a path or fsspec URL. All methods raise ``UserError`` naming the option."""

    def __init__(self, place: str, option: str) -> None:
        self.place = place
        self.where = f"{option} '{redact(place)}'"
        filesystem, path = open_url(place, what=option)
        self._filesystem, self._path = filesystem, path
        if is_local(filesystem) and not filesystem.isfile(path):
            raise UserError(f"{self.where}: no such file")
        with self._opened() as zipped:
            infos = zipped.infolist()
        self._infos = {info.filename.removesuffix(".npy"): info for info in infos}

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return list(self._infos)

    def header(self, name: str) -> Header:
        """Header of an array, whose member has the right number of bytes."""
        with self._opened() as zipped, self._member(zipped, name) as member:
            return self._read_header(name, member)

    def blocks(self, name: str, rows: int, limit: int | None = None) -> Iterator[np.ndarray]:
        """The array's first ``limit`` rows, at most ``rows`` and ``MAX_BLOCK`` bytes at a time."""
        with self._opened() as zipped, self._member(zipped, name) as member:
            header = self._read_header(name, member)
            count = header.shape[0] if limit is None else min(limit, header.shape[0])
            rows = fitting_rows(rows, math.prod(header.shape[1:]) * header.dtype.itemsize)
            for start in range(0, count, rows):
                shape = (min(rows, count - start), *header.shape[1:])
                yield self._numbers(name, member, shape, header.dtype)

    def array(self, name: str, max_bytes: int) -> np.ndarray:
        """The whole array. Raises ``UserError`` if it has more than ``max_bytes``."""
        with self._opened() as zipped, self._member(zipped, name) as member:
            header = self._read_header(name, member)
            if math.prod(header.shape) * header.dtype.itemsize > max_bytes:
                raise UserError(f"{self.where}: '{name}' has shape {header.shape}: too large")
            return self._numbers(name, member, header.shape, header.dtype)

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            with self._filesystem.open(self._path, "rb") as file, zipfile.ZipFile(file) as zipped:
                yield zipped
        except (UserError, GeneratorExit):
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, struct.error):
            raise self._damaged() from None
        except Exception as error:  # every fsspec backend raises its own types
            reason = plain_text(without_secrets(str(error), self.place))[:200]
            raise UserError(f"{self.where} cannot be read: {reason}") from None

    def _member(self, zipped: zipfile.ZipFile, name: str) -> IO[bytes]:
        info = self._infos.get(name)
        if info is None:
            raise UserError(
                f"{self.where} has no array '{name}'; it holds: {', '.join(self.names)}"
            )
        return zipped.open(info)

    def _read_header(self, name: str, member: IO[bytes]) -> Header:
        try:
            header = read_npy_header(member)
        except ValueError:
            raise UserError(f"{self.where}: '{name}' is not a numpy array, or damaged") from None
        if header.dtype.hasobject:
            raise UserError(
                f"{self.where}: '{name}' holds Python objects, which run code when read: "
                "save plain numbers"
            )
        size = header.offset + math.prod(header.shape) * header.dtype.itemsize
        if min(header.shape, default=0) < 0 or self._infos[name].file_size != size:
            raise self._damaged()
        if header.fortran_order and len(header.shape) > 1:
            raise UserError(f"{self.where}: '{name}' is in Fortran's order; save it in C's")
        return header

    def _numbers(
        self, name: str, member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> np.ndarray:
        data = bytearray(math.prod(shape) * dtype.itemsize)  # the array's memory: writable, no copy
        rest = memoryview(data)
        while rest:
            # in small pieces, because zipfile makes a copy of each
            found = member.readinto(rest[:PIECE])  # type: ignore[attr-defined]
            if not found:
                raise self._damaged()
            rest = rest[found:]
        return np.frombuffer(data, dtype).reshape(shape)

    def _damaged(self) -> UserError:
        return UserError(
            f"{self.where} is damaged, cut short or not an .npz file: write or copy it again"
        )


def read_about(archive: Archive) -> dict[str, Any]:
    """The metadata that this project writes to an .npz; empty for other files. Raises
    ``UserError``."""
    if ABOUT not in archive:
        return {}
    header = archive.header(ABOUT)
    try:
        if header.dtype.kind != "U" or header.shape != ():
            raise ValueError("not a text")
        about = json.loads(str(archive.array(ABOUT, MAX_ABOUT)[()]))
        if not isinstance(about, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        reason = plain_text(str(error))[:100]
        raise UserError(
            f"{archive.where}: '{ABOUT}' is not JSON of this project: {reason}"
        ) from None
    return about


IMAGES, LABELS, CAPTIONS = "arr_0", "labels", "captions"


@lru_cache(maxsize=256)
def npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    """The header of a .npy file, version 1.0, whose numbers follow in C order."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """An array as a .npy file."""
    file = io.BytesIO()
    npy.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def write_npz(
    path: Path,
    shape: tuple[int, int, int, int],
    pieces: Iterable[bytes],
    labels: np.ndarray[Any, Any],
    about: dict[str, Any],
) -> None:
    """Write images (N, R, R, 3) as uint8 from their bytes, labels (N,), which are int64 or texts
    (captions), and a JSON text.

    Equal images make equal files. Raises ``ValueError`` if ``pieces`` have another size.
    """
    # stored, because images do not compress and ADM's evaluator reads the bytes in place
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        left = int(np.prod(shape, dtype=np.int64))
        with archive.open(_entry(IMAGES), "w", force_zip64=True) as member:
            member.write(npy_header(shape))
            for piece in pieces:
                member.write(piece)
                left -= len(piece)
        if left:
            raise ValueError(f"images of shape {shape} lack {left} bytes")
        if labels.dtype.kind == "U":
            archive.writestr(_entry(CAPTIONS), npy_bytes(labels))
        else:
            archive.writestr(_entry(LABELS), npy_bytes(labels.astype(np.int64)))
        archive.writestr(_entry(ABOUT), npy_bytes(np.array(json.dumps(about))))


def _entry(name: str) -> zipfile.ZipInfo:
    """An entry without time stamp, so that equal images make equal files."""
    return zipfile.ZipInfo(f"{name}.npy")
