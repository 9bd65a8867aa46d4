"""Reading local files, which may turn out to be pipes, devices or folders."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import fsspec

from pipeline.storage.filesystem import is_local


@contextmanager
def open_regular(path: str) -> Iterator[int | None]:
    """A descriptor to read a file from; None if it is not a regular file, because a pipe may block
    forever and a device may not end. Raises ``OSError``."""
    descriptor = _open_regular(path)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open_regular(path: str) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket
            raise
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


class LocalFile:
    """A local file that is open until its last user drops it, whichever thread that is."""

    descriptor: int | None = None
    """None if it is not a regular file."""

    def __init__(self, path: str, *, ahead: bool = False) -> None:
        """``ahead`` asks the system to read the whole file in the background. Raises
        ``OSError``."""
        self.descriptor = _open_regular(path)
        if self.descriptor is not None and ahead and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # ``close`` is an argument, because globals are gone when the interpreter ends.
        if self.descriptor is not None:
            close(self.descriptor)


def read_range(descriptor: int, begin: int, end: int | None = None) -> bytes:
    """Bytes [begin, end) of a regular file, or from ``begin`` to its end. A range beyond its end is
    cut before memory is allocated."""
    size = os.fstat(descriptor).st_size
    end = size if end is None else min(end, size)
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        file.seek(begin)
        return file.read(max(0, end - begin))


Buffer = bytearray | memoryview


GAP = 4096
"""Bytes between two pieces up to which they are read in one call and the gap is discarded: a tar's
headers cost less than a second call. (Chunks of a zarr shard are in any order, not that of
rows.)"""


MAX_BUFFERS = 512
"""Buffers of one call; the system accepts 1024."""


_discarded = memoryview(bytearray(GAP))  # written by all threads, never read


def scatter(descriptor: int, pieces: Sequence[tuple[int, Sequence[Buffer]]]) -> list[int]:
    """Fill the buffers of each piece (offset, buffers). Returns the number of bytes read of
    each."""
    counts = [0] * len(pieces)
    order = sorted(range(len(pieces)), key=lambda number: pieces[number][0])
    begin = end = 0
    buffers: list[Buffer] = []
    members: list[tuple[int, int, int]] = []  # piece, where it begins, its bytes
    for number in order:
        offset, wanted = pieces[number]
        size = sum(map(len, wanted))
        gap = offset - end
        if members and (not 0 <= gap <= GAP or len(buffers) + len(wanted) >= MAX_BUFFERS):
            _read(descriptor, begin, buffers, members, counts)
            buffers, members = [], []
        if not members:
            begin = offset
        elif gap:
            buffers.append(_discarded[:gap])
        buffers.extend(wanted)
        members.append((number, offset, size))
        end = offset + size
    if members:
        _read(descriptor, begin, buffers, members, counts)
    return counts


def _read(
    descriptor: int,
    begin: int,
    buffers: list[Buffer],
    members: list[tuple[int, int, int]],
    counts: list[int],
) -> None:
    position, end = begin, max(offset + size for _, offset, size in members)
    while position < end:
        got = os.preadv(descriptor, buffers, position)
        if not got:
            break
        position += got
        if position < end:
            buffers = _skip(buffers, got)
    for number, offset, size in members:
        counts[number] = max(0, min(size, position - offset))


def _skip(buffers: list[Buffer], count: int) -> list[Buffer]:
    """The rest of the buffers after their first ``count`` bytes."""
    for number, buffer in enumerate(buffers):
        if count < len(buffer):
            return [memoryview(buffer)[count:], *buffers[number + 1 :]]
        count -= len(buffer)
    return []


def files_below(
    filesystem: fsspec.AbstractFileSystem, path: str, broken: list[str] | None = None
) -> dict[str, int]:
    """Full path and size of each file; raises the backend's errors. Links that lead nowhere are
    appended to ``broken``."""
    if is_local(filesystem):  # fsspec's walk silently skips unreadable folders
        return dict(_walk(path, frozenset(), broken))
    filesystem.invalidate_cache()
    found = filesystem.find(path, detail=True)
    return {
        str(name): int(info["size"])
        for name, info in found.items()
        if info["type"] == "file" and not str(name).endswith("/")  # placeholder of a folder
    }


def folders_in(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Names of the folders directly in a folder, and of links to folders; raises the backend's
    errors."""
    if is_local(filesystem):
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if os.path.isdir(entry.path))
    filesystem.invalidate_cache()
    found = filesystem.ls(path, detail=True)
    folders = (str(info["name"]) for info in found if info["type"] == "directory")
    below = {name.strip("/") for name in folders} - {path.strip("/")}
    return sorted(name.rpartition("/")[2] for name in below)


def _walk(
    folder: str, above: frozenset[tuple[int, int]], broken: list[str] | None
) -> Iterator[tuple[str, int]]:
    """Follows links to folders, for stores spread over disks, but not in cycles."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            try:
                if entry.is_dir():
                    yield from _walk(entry.path, above | {here}, broken)
                else:
                    yield entry.path, entry.stat().st_size
            except OSError as error:
                nowhere = error.errno in (errno.ENOENT, errno.ELOOP) and entry.is_symlink()
                if nowhere and broken is not None:
                    broken.append(entry.path)
                elif error.errno != errno.ENOENT:  # else renamed or removed in the meantime
                    raise
