"""One process at a time in a folder: the others are refused, or wait for their turn."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.storage.files import TEMPORARY
from schemas.errors import UserError

LOCK = f"{TEMPORARY}lock"
"""Its name says that it is nothing of the folder's own."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a filesystem says that knows no locks: then there is none."""


@contextmanager
def exclusive_lock(folder: Path, *, what: str, remedy: str) -> Iterator[None]:
    """Hold the lock of ``folder``, which is made if it is not there and, if empty then, removed
    when the context ends. The system lets go of the lock of a process that dies.

    ``what`` names the option and its value. Raises ``UserError`` where another process holds the
    lock, or the folder cannot be written to.
    """
    path = folder / LOCK
    was_there = folder.is_dir()
    try:
        descriptor = _take(path)
    except BlockingIOError:
        raise UserError(
            f"{what} is being written by {_holder(path)}: wait until that has ended, or {remedy}"
        ) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{what} cannot be written ({reason}): {remedy}") from None
    try:
        yield
    finally:
        if _is_still(path, descriptor):  # else it has gone with the folder, and may be another's
            path.unlink(missing_ok=True)
        os.close(descriptor)
        if not was_there:
            with suppress(OSError):  # it is not empty, or has gone
                folder.rmdir()


@contextmanager
def wait_lock(folder: Path) -> Iterator[None]:
    """Wait for the lock of ``folder``, which must be there, and hold it for the context: for what
    takes a moment. Where the filesystem has no locks, nothing is held."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _take(path: Path) -> int:
    """A descriptor that holds the lock. Raises ``BlockingIOError`` where it is held."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it removed it meanwhile


def _lock(descriptor: int, how: int) -> None:
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:200] or "another process"
    except OSError:
        return "another process"
