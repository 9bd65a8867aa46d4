"""Locks between processes: ``flock`` on files, which the system releases when a process dies."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import Timeout, UnixFileLock, lock_descriptor

from pipeline.storage.files import TEMPORARY
from schemas.errors import UserError

LOCK = f"{TEMPORARY}lock"
"""Name of the lock file in a folder; it marks the file as temporary."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of a file system without locks, on which work goes on without one."""
RACE_SECONDS = 0.2
"""Seconds to try before a refusal, because the holder removes the lock file when it ends."""
POLL_SECONDS = 0.01


@contextmanager
def exclusive_lock(folder: Path, *, what: str, remedy: str) -> Iterator[None]:
    """Hold the lock of ``folder``.

    A missing folder is made, and removed at the end if it is empty. The lock file is removed at the
    end too, and stays if the process is killed. ``what`` names the option and its value. Raises
    ``UserError`` where another process holds the lock, or the folder cannot be written to.
    """
    path = folder / LOCK
    existed = folder.is_dir()
    lock = UnixFileLock(path, timeout=RACE_SECONDS, thread_local=False, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _without_locks():
            lock.acquire()
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        own_file = path.stat()
    except Timeout:
        raise UserError(
            f"{what} is being written by {_holder(path)}: wait until it ends, or {remedy}"
        ) from None
    except OSError as error:
        lock.release()
        reason = error.strerror or type(error).__name__
        raise UserError(f"{what} cannot be written ({reason}): {remedy}") from None
    try:
        yield
    finally:
        with suppress(OSError):  # the folder was removed, or a new one is locked by another process
            if os.path.samestat(path.stat(), own_file):
                path.unlink()
        lock.release()
        if not existed:
            with suppress(OSError):  # not empty, or already removed
                folder.rmdir()


@contextmanager
def wait_lock(path: Path) -> Iterator[None]:
    """Wait for the lock of a folder, or of a file, which is made if it is missing, and hold it.

    For short work. Nothing is held where ``path`` cannot be opened or the file system has no locks.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError:
        yield
        return
    try:
        with _without_locks():
            lock_descriptor(descriptor, poll_interval=POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _without_locks() -> Iterator[None]:
    """Ignore the refusal of a file system that has no locks."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _holder(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:200] or "another process"
    except OSError:
        return "another process"
