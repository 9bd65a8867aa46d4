"""Local disk cache of remote shards, up to a byte limit, shared by the workers of a node."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.storage.files import TEMPORARY
from pipeline.storage.locks import wait_lock
from schemas.errors import UserError

logger = logging.getLogger(__name__)

TOTAL = ".total"
"""Upper bound of the bytes of the folder's files; changed only while its lock is held."""
ABANDONED_SECONDS = 3600.0
"""Age at which a temporary file counts as left by a dead process."""
FILL_LOCKS = 1024


class DiskCache:
    """A folder of files named by their SHA-256, with eviction of the least recently used ones.

    Several processes of one node share a folder, for any number of stores. A file gets its name
    only after its bytes match its hash. Training never depends on the cache: files that cannot be
    written are not cached, and readers verify what they read.
    """

    def __init__(self, folder: str, limit: int) -> None:
        """At most ``limit`` bytes. Raises ``UserError`` where ``folder`` cannot be written to."""
        self.folder = Path(folder).expanduser()
        self.limit = limit
        self._bypassed_until = -1
        self._warned: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._set_total(self._make_room(0))
        except OSError as error:
            raise UserError(f"--data.cache-dir '{folder}': {error.strerror or error}") from None

    def path(self, sha256: str) -> Path | None:
        """The cached file with this hash, or None; counts as a use of it."""
        path = self.folder / sha256
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def fill(
        self, sha256: str, size: int, fetch: Callable[[], bytes], expires_at: int = 0
    ) -> bytes | None:
        """Fetch a file and cache it. Returns its bytes, or None if another worker has just cached
        it. ``expires_at`` is the position of the run where the file's shuffle window ends.

        Workers that need the same file wait for the one that fetches it. A file with another size
        or hash is returned, so that the reader reports the damage, but not cached.
        """
        with self._filling(sha256):
            if self.path(sha256) is not None:
                return None
            data = fetch()
            if len(data) == size and hashlib.sha256(data).hexdigest() == sha256:
                self._write(sha256, data, expires_at)
            return data

    def is_useful(self, expires_at: int) -> bool:
        """True if it pays to fetch whole files only for this cache in the window that ends at
        ``expires_at``: False once a file of that window could not be cached."""
        return expires_at > self._bypassed_until

    def report_overflow(self, expires_at: int) -> None:
        """Bypass the cache until ``expires_at``, because files of that window evict each other."""
        self._bypass(
            expires_at, "cannot hold the files of a shuffle window", "raise --data.cache-gb"
        )

    def discard(self, sha256: str) -> None:
        """Delete a file whose bytes do not match its name."""
        try:
            with self._locked():
                path = self.folder / sha256
                size = path.stat().st_size
                path.unlink()
                self._set_total(self._total() - size)
        except OSError:
            return

    def _bypass(self, expires_at: int, reason: str, remedy: str) -> None:
        """Cache no more files of this window; warn once per reason, because storage is read more
        than the user expects."""
        self._bypassed_until = max(self._bypassed_until, expires_at)
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning(
                "--data.cache-dir '%s' %s (--data.cache-gb %g): reading from the store instead; %s",
                self.folder,
                reason,
                self.limit / 1e9,
                remedy,
            )

    def _write(self, sha256: str, data: bytes, expires_at: int) -> None:
        """Write a file if there is or can be made room for it. A full disk is not an error."""
        if len(data) > self.limit:
            self.report_overflow(expires_at)
            return
        temporary = self.folder / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            with self._locked():  # reserve the bytes before they are written
                total = self._total()
                if total + len(data) > self.limit:
                    total = self._make_room(len(data))
                if total + len(data) > self.limit:
                    self._set_total(total)
                    self.report_overflow(expires_at)
                    return
                temporary.touch()
                os.truncate(temporary, len(data))  # counted by other workers that add up meanwhile
                self._set_total(total + len(data))
            with temporary.open("r+b") as file:
                file.write(data)
            with self._locked():  # a worker that adds up during the rename could miss both names
                os.replace(temporary, self.folder / sha256)
        except OSError as error:
            temporary.unlink(missing_ok=True)  # the total is corrected when it is next added up
            why = error.strerror or type(error).__name__
            self._bypass(
                expires_at,
                f"cannot be written to: {why}",
                "free space there or lower --data.cache-gb",
            )

    def _make_room(self, size: int) -> int:
        """Add up all files; if ``size`` more bytes do not fit, delete the least recently used files
        down to 90% of the limit. Returns the bytes that remain."""
        files = []
        for entry in os.scandir(self.folder):
            try:
                info = entry.stat()
            except FileNotFoundError:
                continue
            if entry.name.startswith(TEMPORARY):
                if time.time() - info.st_mtime > ABANDONED_SECONDS:
                    Path(entry.path).unlink(missing_ok=True)
                    continue
                files.append((float("inf"), info.st_size, entry.path))
            elif len(entry.name) == 64:
                files.append((info.st_mtime, info.st_size, entry.path))
        total = sum(file_size for _, file_size, _ in files)
        if total + size <= self.limit:
            return total
        goal = min(self.limit - size, self.limit * 9 // 10)  # not every new file must evict again
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
