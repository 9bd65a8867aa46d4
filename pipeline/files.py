"""fsspec URLs: opening one with errors that people can act on, and atomic writes."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import UserError

TEMPORARY = ".tmp-"
"""Files whose name starts so are being written, or were when something died."""


def open_url(url: str, *, what: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of an fsspec URL and the path on it. ``what`` names the option in errors."""
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"{what} '{without_credentials(url)}': {error}") from None
    return filesystem, str(path).rstrip("/") or "/"


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    return isinstance(filesystem, LocalFileSystem)


def without_credentials(url: str) -> str:
    """``s3://user:secret@bucket/x?token=y`` without what must not be written down."""
    url = re.sub(r"(?<=://)[^/\s]*@", "", url)
    return re.sub(r"\?\S*", "", url) if "://" in url else url


def absolute_url(url: str) -> str:
    """Local paths made absolute (they are read by processes elsewhere), URLs as they are."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def read_bytes(filesystem: fsspec.AbstractFileSystem, path: str) -> bytes:
    """A whole small file."""
    data: bytes = filesystem.cat_file(path)
    return data


def read_ranges(
    filesystem: fsspec.AbstractFileSystem, path: str, ranges: Sequence[tuple[int, int]]
) -> list[bytes]:
    """Bytes ``[begin, end)`` of one file for each range, fetched concurrently."""
    begins, ends = [begin for begin, _ in ranges], [end for _, end in ranges]
    blocks: list[bytes] = filesystem.cat_ranges(
        [path] * len(ranges), begins, ends, on_error="raise"
    )
    return blocks


def write_atomic(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Write a small file so that a reader sees the old one, none or all of the new one."""
    if not is_local(filesystem):  # object stores publish an object when it is whole
        filesystem.pipe_file(path, data)
        return
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def publish(filesystem: fsspec.AbstractFileSystem, local: Path, path: str) -> None:
    """Move a finished local file to ``path`` under its final name, atomically."""
    if is_local(filesystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(local, path)
    else:
        filesystem.put_file(str(local), path)
        local.unlink()


def sha256_of_arrays(items: Any) -> str:
    """SHA-256 over an iterable of (name, numpy array), names, dtypes and shapes included."""
    digest = hashlib.sha256()
    for name, array in items:
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def exists(filesystem: fsspec.AbstractFileSystem, path: str) -> bool:
    return bool(filesystem.exists(path))


def list_folder(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Full paths of what lies in a folder now; none where there is no such folder."""
    filesystem.invalidate_cache()
    try:
        return [str(found) for found in filesystem.ls(path, detail=False)]
    except FileNotFoundError:
        return []


def list_tree(filesystem: fsspec.AbstractFileSystem, path: str) -> dict[str, int]:
    """Every file below a folder, with its size in bytes."""
    filesystem.invalidate_cache()
    found = filesystem.find(path, detail=True)
    return {str(name): int(info["size"]) for name, info in found.items()}


def remove(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    filesystem.rm_file(path)


def file_size(filesystem: fsspec.AbstractFileSystem, path: str) -> int:
    return int(filesystem.size(path))
