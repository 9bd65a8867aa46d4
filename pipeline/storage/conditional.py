"""Writes that depend on what a place holds: files that only the first writer makes, and changes of
small files of which none is lost.

Local disks: a hard link, and a lock of the file. S3: conditional requests. Other storage creates
exclusively if its backend does; its changes are a check before a write, which two processes may
pass at the same moment.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fsspec

from pipeline.storage.errors import is_precondition_failed, is_unsupported
from pipeline.storage.files import exists, read_bytes, write_atomic, write_local
from pipeline.storage.filesystem import is_local, is_s3, upload_options
from pipeline.storage.locks import wait_lock
from pipeline.storage.retry import StorageError, retrying, shown

NO_LINKS = {errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of a file system without hard links."""
MAX_CONFLICTS = 100
MAX_PAUSE = 0.05
"""Seconds before a change is tried again, at most."""

_jitter = random.Random()  # not the global generator, whose state belongs to the caller
_unconditional = threading.Lock()
"""Held by the threads of this process while they check and write where there is no condition."""


def write_new(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes) -> bool:
    """Write a small file atomically unless one exists. Returns True if this call has made it.

    A request that is repeated after a lost answer finds its own file and returns False: compare the
    contents.
    """

    def write() -> bool:
        if is_local(filesystem):
            return _write_new_local(Path(path), data)
        if exists(filesystem, path):  # a backend may ignore the condition
            return False
        try:
            return _put(filesystem, path, data, mode="create")
        except Exception as error:
            if not is_unsupported(error):
                raise
        with _unconditional:
            return not exists(filesystem, path) and _put(filesystem, path, data)

    return retrying(write, filesystem, path, doing="write")


def update_file(
    filesystem: fsspec.AbstractFileSystem, path: str, change: Callable[[bytes | None], bytes]
) -> None:
    """Replace the contents of a small file by ``change(contents)``, atomically.

    ``change`` gets None where there is no file. It is called again if another process has changed
    the file in the meantime, so that both changes are made; it must be safe to repeat.
    """
    for _ in range(MAX_CONFLICTS):
        tag, old = _read_tagged(filesystem, path)
        new = change(old)
        if new == old or _replace(filesystem, path, tag, old, new):
            return
        time.sleep(_jitter.uniform(0, MAX_PAUSE))
    raise StorageError(
        f"cannot write '{shown(filesystem, path)}': other commands have changed it "
        f"{MAX_CONFLICTS} times in the meantime; run the same command again"
    )


def replace_if(filesystem: fsspec.AbstractFileSystem, path: str, old: bytes, new: bytes) -> bool:
    """Replace the contents of a small file if they are ``old``. Returns False if they are not. A
    request that is repeated after a lost answer may find ``new`` and return False."""
    tag, found = _read_tagged(filesystem, path)
    return found == old and _replace(filesystem, path, tag, old, new)


def _read_tagged(filesystem: fsspec.AbstractFileSystem, path: str) -> tuple[str, bytes | None]:
    """The entity tag (empty except on S3) and the contents of a file, None if it does not exist.
    The tag is read first, so that a change in between makes the condition fail."""

    def look() -> str:
        filesystem.invalidate_cache()
        return str(filesystem.info(path)["ETag"])

    try:
        tag = retrying(look, filesystem, path, doing="look at") if is_s3(filesystem) else ""
        return tag, read_bytes(filesystem, path)
    except FileNotFoundError:
        return "", None


def _replace(
    filesystem: fsspec.AbstractFileSystem, path: str, tag: str, old: bytes | None, new: bytes
) -> bool:
    """Write ``new`` if the file still holds ``old``. Returns False if it does not."""
    if old is None:
        return write_new(filesystem, path, new)
    if is_s3(filesystem):
        try:
            return retrying(
                lambda: _put(filesystem, path, new, IfMatch=tag), filesystem, path, doing="write"
            )
        except FileNotFoundError:  # deleted in the meantime
            return False
    lock: AbstractContextManager[Any] = _unconditional
    if is_local(filesystem):
        lock = wait_lock(Path(path))
    with lock:
        if _read_tagged(filesystem, path)[1] != old:
            return False
        write_atomic(filesystem, path, new)
    return True


def _put(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes, **condition: str) -> bool:
    """Upload a file in one request. Returns False if the condition does not hold."""
    options: dict[str, Any] = upload_options(filesystem, len(data))
    if is_s3(filesystem):
        options["chunksize"] = max(1, len(data))  # a condition is part of one request
    try:
        filesystem.pipe_file(path, data, **options, **condition)
    except Exception as error:
        if condition and is_precondition_failed(error):
            return False
        raise
    return True


def _write_new_local(path: Path, data: bytes) -> bool:
    """A link appears with all contents, where an exclusively created file would be empty first."""

    created = True

    def place(temporary: Path, path: Path) -> None:
        nonlocal created
        try:
            os.link(temporary, path)
        except FileExistsError:
            created = False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            with wait_lock(path.parent):
                created = not os.path.lexists(path)
                if created:
                    os.replace(temporary, path)

    write_local(path, lambda file: file.write(data), place)
    return created
