"""Files at fsspec URLs: reading, listing and atomic writing, with retries.

Functions that access storage are thread-safe and retry transient errors for up to
``RETRY_SECONDS``. They raise ``FileNotFoundError`` if the file does not exist and ``StorageError``
(a message of one line) for any other failure.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from pipeline.storage.errors import is_beyond_the_end
from pipeline.storage.filesystem import (
    absolute_folder,
    absolute_url,
    is_local,
    is_s3,
    open_url,
    upload_options,
)
from pipeline.storage.local import LocalFile, files_below, folders_in, open_regular, read_range
from pipeline.storage.redaction import redact
from pipeline.storage.retry import RETRY_SECONDS, RETRY_VARIABLE, StorageError, retrying, shown
from pipeline.text import short_value
from schemas.errors import UserError, plain_text

T = TypeVar("T")

__all__ = [
    "MAX_NAMED",
    "RETRY_SECONDS",
    "RETRY_VARIABLE",
    "TEMPORARY",
    "StorageError",
    "absolute_folder",
    "absolute_url",
    "exists",
    "file_size",
    "is_local",
    "list_folder",
    "list_folders",
    "list_source",
    "list_tree",
    "open_url",
    "publish",
    "read_at_most",
    "read_bytes",
    "read_directly",
    "read_ranges",
    "redact",
    "remove",
    "retrying",
    "write_atomic",
]

TEMPORARY = ".tmp-"
"""Prefix of the names of temporary files, which stay if their writer is killed."""
MAX_NAMED = 5
"""Files or folders that an error names."""


def read_bytes(filesystem: fsspec.AbstractFileSystem, path: str) -> bytes:
    """A whole file, for files that fit in memory. Raises ``StorageError`` if a local path is not a
    regular file."""
    if is_local(filesystem):
        return retrying(lambda: _read_local(path), filesystem, path, doing="read")
    # s3fs asks for the size first, to read large files in parts: a second request per file
    options = {"max_concurrency": 1} if is_s3(filesystem) else {}

    def read() -> bytes:
        data: bytes = filesystem.cat_file(path, **options)
        return data

    return retrying(read, filesystem, path, doing="read")


def read_at_most(filesystem: fsspec.AbstractFileSystem, path: str, size: int) -> bytes:
    """The first ``size`` bytes of a file, or fewer; empty if it is not a regular file."""
    if is_local(filesystem):
        file_size(filesystem, path)  # raises if it is a folder
    (data,) = read_ranges(filesystem, path, [(0, size)])
    return data


def read_ranges(
    filesystem: fsspec.AbstractFileSystem, path: str, ranges: Sequence[tuple[int, int]]
) -> list[bytes]:
    """The bytes [begin, end) of one file for each of ``ranges``, concurrently on object stores.

    Where the file ends earlier there are fewer bytes than requested: callers compare lengths. A
    local path that is not a regular file (a folder, a pipe, a device) is empty.
    """
    parts = [b""] * len(ranges)
    wanted = [index for index, (begin, end) in enumerate(ranges) if begin < end]

    def read_local() -> None:
        with open_regular(path) as descriptor:
            if descriptor is None:
                return
            for index in wanted:
                parts[index] = read_range(descriptor, *ranges[index])

    def read_remote() -> None:
        nonlocal wanted
        begins, ends = zip(*(ranges[index] for index in wanted), strict=True)
        answers = filesystem.cat_ranges(
            [path] * len(wanted), list(begins), list(ends), on_error="return"
        )
        failed: dict[int, Exception] = {}
        for index, answer in zip(wanted, answers, strict=True):
            if not isinstance(answer, Exception):
                parts[index] = answer
            elif not is_beyond_the_end(answer):
                failed[index] = answer
        wanted = list(failed)  # the next attempt requests only these
        if failed:
            raise next(iter(failed.values()))

    if wanted:
        read = read_local if is_local(filesystem) else read_remote
        retrying(read, filesystem, path, doing="read")
    return parts


def read_directly(
    filesystem: fsspec.AbstractFileSystem,
    path: str,
    read: Callable[[int], T],
    *,
    ahead: bool = False,
    open_file: Callable[..., LocalFile] = LocalFile,
) -> T | None:
    """Call ``read`` with the descriptor of a local file; None if that is not a regular file.
    ``read`` must be safe to repeat. ``ahead`` asks the system to read the whole file in the
    background. ``open_file(path, ahead=...)`` may return a file that is open already."""

    def attempt() -> T | None:
        file = open_file(path, ahead=ahead)
        return None if file.descriptor is None else read(file.descriptor)

    return retrying(attempt, filesystem, path, doing="read")


def write_atomic(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Write a small file atomically: readers see the old file or the complete new one."""

    def write() -> None:
        if is_local(filesystem):
            write_local(Path(path), lambda file: file.write(data))
        else:  # object stores publish complete objects only
            filesystem.pipe_file(path, data, **upload_options(filesystem, len(data)))

    retrying(write, filesystem, path, doing="write")


def publish(filesystem: fsspec.AbstractFileSystem, local: Path, path: str) -> None:
    """Move a finished local file to ``path`` under its final name, atomically.

    On failure ``local`` is not changed.
    """
    if is_local(filesystem):
        retrying(lambda: _move(local, Path(path)), filesystem, path, doing="write")
        return
    size = local.stat().st_size
    options = upload_options(filesystem, size)
    retrying(
        lambda: filesystem.put_file(str(local), path, **options), filesystem, path, doing="write"
    )
    try:
        stored = file_size(filesystem, path)
    except FileNotFoundError:
        stored = -1
    if stored != size:
        found = "nothing" if stored < 0 else f"{stored} bytes"
        raise StorageError(
            f"cannot write '{shown(filesystem, path)}': {size} bytes were sent and {found} found "
            "there afterwards; check the storage and run the same command again"
        )
    local.unlink()


def exists(filesystem: fsspec.AbstractFileSystem, path: str) -> bool:
    """True if there is a file or folder. Raises ``StorageError`` if that cannot be determined."""
    return _info(filesystem, path) is not None


def file_size(filesystem: fsspec.AbstractFileSystem, path: str) -> int:
    """Size of a file in bytes."""
    info = _info(filesystem, path)
    if info is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if info["type"] == "directory":
        raise StorageError(
            f"'{shown(filesystem, path)}' is a folder where a file should be; move it away"
        )
    return int(info["size"])


def list_folder(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Full paths of the entries of a folder, sorted; empty if the folder does not exist."""

    def look() -> list[str]:
        filesystem.invalidate_cache()  # other processes write to the same folders
        return [str(entry).rstrip("/") for entry in filesystem.ls(path, detail=False)]

    try:
        found = retrying(look, filesystem, path, doing="list")
    except FileNotFoundError:
        return []
    return sorted(set(found) - {path.rstrip("/")})  # some backends list a placeholder of the folder


def list_tree(filesystem: fsspec.AbstractFileSystem, path: str) -> dict[str, int]:
    """Full path and size of every file below a folder; empty if the folder does not exist."""
    try:
        return retrying(
            lambda: files_below(filesystem, path), filesystem, path, doing="list what is below"
        )
    except FileNotFoundError:
        return {}


def list_folders(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Sorted names of the folders directly in a folder, empty ones too."""
    return retrying(lambda: folders_in(filesystem, path), filesystem, path, doing="list")


def list_source(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Sorted paths, relative to a folder, of every file below it that is not hidden; empty if the
    folder does not exist. Raises ``UserError`` naming links that lead nowhere, because without
    their files it would be another data set."""
    links: list[str] = []
    try:
        found = retrying(
            lambda: files_below(filesystem, path, links),
            filesystem,
            path,
            doing="list what is below",
        )
    except FileNotFoundError:
        return []
    broken = _relative(links, path)
    if broken:
        named = ", ".join(plain_text(short_value(link, 200)) for link in broken[:MAX_NAMED])
        more = f" and {len(broken) - MAX_NAMED} more" if len(broken) > MAX_NAMED else ""
        raise UserError(
            f"links that lead nowhere: {named}{more}; restore what they point to, or remove them"
        )
    return _relative(found, path)


def _relative(paths: Iterable[str], folder: str) -> list[str]:
    """Sorted paths relative to a folder, without hidden files and folders."""
    names = sorted({path[len(folder) :].lstrip("/") for path in paths})
    return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def remove(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    """Delete a file if it exists."""
    try:
        retrying(lambda: filesystem.rm_file(path), filesystem, path, doing="delete")
    except FileNotFoundError:
        return


def _info(filesystem: fsspec.AbstractFileSystem, path: str) -> dict[str, Any] | None:
    """Size and type of the entry at ``path``, None if there is none."""

    def look() -> dict[str, Any] | None:
        filesystem.invalidate_cache()
        try:
            info: dict[str, Any] = filesystem.info(path)
        except NotADirectoryError:  # a parent is a file
            return None
        return info

    try:
        return retrying(look, filesystem, path, doing="look at")
    except FileNotFoundError:
        return None


def _read_local(path: str) -> bytes:
    with open_regular(path) as descriptor:
        if descriptor is not None:
            return read_range(descriptor, 0)
    number = errno.EISDIR if os.path.isdir(path) else errno.EINVAL
    reason = os.strerror(number) if number == errno.EISDIR else "a pipe or a device, not a file"
    raise OSError(number, reason, path)


def write_local(
    path: Path,
    write: Callable[[BinaryIO], object],
    place: Callable[[Path, Path], object] = os.replace,
) -> None:
    """``write`` to a temporary file in the same folder and ``place`` (temporary, path) it; the
    temporary file is removed if it is left."""
    _make_parent(path)
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _make_parent(path: Path) -> None:
    """Make the folder of ``path``. The system may report a folder that cannot be made, as below
    /proc, as a missing file, which callers would take for a missing ``path``: raise another error
    instead."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        reason = "its folder cannot be made"
        raise OSError(errno.EINVAL, reason, str(path)) from None


def _move(local: Path, path: Path) -> None:
    _make_parent(path)
    try:
        os.replace(local, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with local.open("rb") as source:  # from another disk
            write_local(path, lambda file: shutil.copyfileobj(source, file, 1 << 20))
        local.unlink()
