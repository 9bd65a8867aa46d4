"""Shards of remote stores on a local disk, up to a number of bytes, shared by a node's workers."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.storage.files import TEMPORARY
from pipeline.storage.locks import wait_lock
from schemas.errors import UserError

TOTAL = ".total"
"""Bytes of the folder's files, never less than they are; whoever changes it holds its lock."""
ABANDONED_SECONDS = 3600.0
"""A temporary file that was not written to for so long belongs to nobody any more."""
FILL_LOCKS = 1024


class DiskCache:
    """A folder of files named by their SHA-256, the least recently used of which make room.

    Several processes of one node use one folder, for any number of stores. A file gets its name
    when its bytes have been compared with its hash. Nothing here must be right for training to be:
    what cannot be written is not cached, and readers check what they find.
    """

    def __init__(self, folder: str, limit: int) -> None:
        """At most ``limit`` bytes. Raises ``UserError`` where ``folder`` cannot be written to."""
        self.folder = Path(folder).expanduser()
        self.limit = limit
        self._given_up = -1
        self._said: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._set_total(self._make_room(0))
        except OSError as error:
            raise UserError(f"--data.cache-dir '{folder}': {error.strerror or error}") from None

    def path(self, sha256: str) -> Path | None:
        """The local file with this hash, where there is one; counts as a use of it."""
        path = self.folder / sha256
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def fill(
        self, sha256: str, size: int, fetch: Callable[[], bytes], until: int = 0
    ) -> bytes | None:
        """Fetch a file and keep it; its bytes, or None where another worker has just done so.
        ``until`` is the position of the run where its shuffle window ends: see ``pays``.

        Workers that want the same file wait for the one that fetches it. What has not the promised
        hash is returned all the same, for the reader to say what is wrong, and not kept.
        """
        with self._filling(sha256):
            if self.path(sha256) is not None:
                return None
            data = fetch()
            if len(data) == size and hashlib.sha256(data).hexdigest() == sha256:
                self._keep(sha256, data, until)
            return data

    def pays(self, until: int) -> bool:
        """Whether to fetch files whole for this cache alone, of whose window ``until`` is the end:
        not any more in one in which it could not hold what it was given."""
        return until > self._given_up

    def overflows(self, until: int) -> None:
        """Take note that the files of the window up to ``until`` push each other out."""
        self._give_up(until, "cannot hold the files of a shuffle window", "raise --data.cache-gb")

    def discard(self, sha256: str) -> None:
        """Delete a file that is not what its name says."""
        try:
            with self._locked():
                path = self.folder / sha256
                size = path.stat().st_size
                path.unlink()
                self._set_total(self._total() - size)
        except OSError:
            return

    def _give_up(self, until: int, reason: str, remedy: str) -> None:
        """Say once why storage is asked again for what should lie here."""
        self._given_up = max(self._given_up, until)
        if reason not in self._said:
            self._said.add(reason)
            sys.stderr.write(
                f"--data.cache-dir '{self.folder}' {reason} (--data.cache-gb "
                f"{self.limit / 1e9:g}): reading from the store instead; {remedy}\n"
            )

    def _keep(self, sha256: str, data: bytes, until: int) -> None:
        """Write a file, if there is or can be made room for it. A full disk is no error."""
        if len(data) > self.limit:
            self.overflows(until)
            return
        temporary = self.folder / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            with self._locked():  # its bytes count before they are there
                total = self._total()
                if total + len(data) > self.limit:
                    total = self._make_room(len(data))
                if total + len(data) > self.limit:
                    self._set_total(total)
                    self.overflows(until)
                    return
                temporary.touch()
                os.truncate(temporary, len(data))  # so that whoever adds up meanwhile sees them
                self._set_total(total + len(data))
            with temporary.open("r+b") as file:
                file.write(data)
            with self._locked():  # renamed while somebody adds up, it could be seen by neither name
                os.replace(temporary, self.folder / sha256)
        except OSError as error:
            temporary.unlink(missing_ok=True)  # its bytes are found missing at the next adding up
            why = error.strerror or type(error).__name__
            self._give_up(
                until, f"cannot be written to: {why}", "free space there or lower --data.cache-gb"
            )

    def _make_room(self, size: int) -> int:
        """Add up all files; delete the oldest where ``size`` more would not fit, down to 90% of the
        limit. Returns the bytes that remain."""
        files = []
        for entry in os.scandir(self.folder):
            try:
                about = entry.stat()
            except FileNotFoundError:
                continue
            if entry.name.startswith(TEMPORARY):
                if time.time() - about.st_mtime > ABANDONED_SECONDS:
                    Path(entry.path).unlink(missing_ok=True)
                    continue
                files.append((float("inf"), about.st_size, entry.path))
            elif len(entry.name) == 64:
                files.append((about.st_mtime, about.st_size, entry.path))
        total = sum(file_size for _, file_size, _ in files)
        if total + size <= self.limit:
            return total
        goal = min(self.limit - size, self.limit * 9 // 10)  # so that not every file adds up anew
        for used, file_size, path in sorted(files):
            if total <= goal or used == float("inf"):
                break
            Path(path).unlink(missing_ok=True)
            total -= file_size
        return total

    def _total(self) -> int:
        try:
            return int((self.folder / TOTAL).read_text())
        except (OSError, ValueError):
            return self._make_room(0)

    def _set_total(self, total: int) -> None:
        (self.folder / TOTAL).write_text(str(total))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with wait_lock(self.folder / f"{TOTAL}-lock"):
            yield

    @contextmanager
    def _filling(self, sha256: str) -> Iterator[None]:
        with wait_lock(self.folder / f".fill-lock-{int(sha256[:8], 16) % FILL_LOCKS}"):
            yield
