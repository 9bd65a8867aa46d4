"""A lock on object stores: a file that its holder rewrites, as a sign of life.

Clocks of machines are not compared: another process watches the file for as long as a holder may be
silent, and takes over a file that has not changed in that time. On the holder's own machine it sees
at once that the holder is dead.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from pipeline.storage.conditional import replace_if, write_new
from pipeline.storage.files import read_bytes, remove
from pipeline.storage.retry import StorageError
from schemas.errors import UserError, plain_text

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
"""Seconds between two signs of life."""
TAKEOVER_SECONDS = 60.0
"""Seconds of silence after which a holder counts as dead."""


def _stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def held_lease(
    filesystem: fsspec.AbstractFileSystem,
    path: str,
    *,
    what: str,
    remedy: str,
    lost: Callable[[], None] = _stop_this_process,
) -> Iterator[None]:
    """Hold the lock file ``path`` of an object store; it is removed at the end.

    Waits up to ``TAKEOVER_SECONDS`` where the file exists, and raises ``UserError`` with the name
    of its holder as soon as that shows life. ``lost`` is called in another thread if another
    process has taken the lock, because this one was silent for so long.
    """
    lease = _Lease(filesystem, path, what)
    lease.acquire(remedy)
    closed = threading.Event()
    thread = threading.Thread(target=lease.keep, args=(closed, lost), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()
        lease.release()


class _Lease:
    def __init__(self, filesystem: fsspec.AbstractFileSystem, path: str, what: str) -> None:
        self.filesystem = filesystem
        self.path = path
        self.what = what
        self._id = uuid.uuid4().hex
        self._beats = 0
        self._held = b""
        """Contents of the file as this process has written them; empty without the lock."""

    def acquire(self, remedy: str) -> None:
        mine = self._contents()
        watched: bytes | None = None
        deadline = 0.0
        while not write_new(self.filesystem, self.path, mine) and self._read() != mine:
            found = self._read()
            if found is None:  # released just now
                continue
            if watched is None:
                watched, deadline = found, time.monotonic() + TAKEOVER_SECONDS
                logger.info(
                    "%s is locked by %s, and is taken over if that shows no life within %g s",
                    self.what,
                    _holder(found),
                    TAKEOVER_SECONDS,
                )
            if found != watched:
                raise UserError(
                    f"{self.what} is being written by {_holder(found)}: wait until it ends, or "
                    f"{remedy}"
                )
            over = time.monotonic() >= deadline or _is_dead(found)
            if over and self._replace(found, mine):
                logger.warning(
                    "%s: %s has died or been silent for %g s, its lock is taken over",
                    self.what,
                    _holder(found),
                    TAKEOVER_SECONDS,
                )
                break
            time.sleep(BEAT_SECONDS / 10)
        self._held = mine

    def keep(self, closed: threading.Event, lost: Callable[[], None]) -> None:
        """Rewrite the file until ``closed``."""
        while not closed.wait(BEAT_SECONDS):
            try:
                self._beats += 1
                new = self._contents()
                if self._replace(self._held, new):
                    self._held = new
                    continue
                holder = _holder(self._read())
            except StorageError as error:
                logger.warning("%s: no sign of life could be written: %s", self.what, error)
                continue
            self._held = b""
            logger.error("%s was taken over by %s: this process ends", self.what, holder)
            lost()
            return

    def release(self) -> None:
        """Remove the file if it is this process's."""
        try:
            if self._held and self._read() == self._held:
                remove(self.filesystem, self.path)
        except StorageError as error:
            logger.warning("%s: its lock could not be removed: %s", self.what, error)

    def _replace(self, old: bytes, new: bytes) -> bool:
        """A repeated request may have been done the first time: the contents decide."""
        return replace_if(self.filesystem, self.path, old, new) or self._read() == new

    def _read(self) -> bytes | None:
        try:
            return read_bytes(self.filesystem, self.path)
        except FileNotFoundError:
            return None

    def _contents(self) -> bytes:
        name = f"process {os.getpid()} on {socket.gethostname()}"
        values = {"holder": name, "id": self._id, "beat": self._beats}
        return json.dumps({**values, "process": _identity(os.getpid())}).encode()


def _holder(contents: bytes | None) -> str:
    """Name of a lock's holder, which may be of any other version of this file."""
    try:
        return plain_text(str(json.loads(contents or b"")["holder"]))[:200]
    except (ValueError, KeyError, TypeError):
        return "another process"


def _identity(pid: int) -> list[str | int] | None:
    """A process among all of all machines: the boot, the namespace of process ids, the id and the
    time of its start. None where the system does not tell, or there is no such process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else [boot, namespace, pid, int(fields[18])]


def _is_dead(contents: bytes) -> bool:
    """True if the holder was a process of this machine that has ended."""
    own = _identity(os.getpid())
    try:
        boot, namespace, pid, start = json.loads(contents)["process"]
    except (ValueError, KeyError, TypeError):
        return False
    here = own is not None and own[:2] == [boot, namespace]
    return here and isinstance(pid, int) and _identity(pid) != [boot, namespace, pid, start]
