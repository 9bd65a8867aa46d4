"""Local files as what they may turn out to be: a pipe, a device or a folder among them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import fsspec

from pipeline.storage.filesystem import is_local


@contextmanager
def open_regular(path: str) -> Iterator[int | None]:
    """A descriptor of a file to read from; None of what is no regular file, which could keep a
    reader waiting for ever (a pipe) or never end (a device). Raises ``OSError``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket
            raise
        descriptor = None
    if descriptor is None:
        yield None
        return
    try:
        yield descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)


def read_range(descriptor: int, begin: int, end: int | None = None) -> bytes:
    """Bytes [begin, end) of a regular file, fewer where it ends before: what is asked for beyond
    its end takes up no memory. Without ``end`` all from ``begin`` on."""
    size = os.fstat(descriptor).st_size
    end = size if end is None else min(end, size)
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        file.seek(begin)
        return file.read(max(0, end - begin))


Buffer = bytearray | memoryview


GAP = 4096
"""Bytes between two pieces that are read and thrown away rather than asked for around: a tar's
headers cost less than asking twice. (zarr orders the chunks of a shard as it likes: a file's order
is not that of its rows.)"""


MAX_BUFFERS = 512
"""Of one call; the system takes 1024."""


_nowhere = memoryview(bytearray(GAP))  # written to by all threads, read by none


def scatter(descriptor: int, pieces: Sequence[tuple[int, Sequence[Buffer]]]) -> list[int]:
    """Fill the buffers of each piece from its offset on; the bytes that there were of each."""
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
            buffers.append(_nowhere[:gap])
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
            buffers = _behind(buffers, got)
    for number, offset, size in members:
        counts[number] = max(0, min(size, position - offset))


def _behind(buffers: list[Buffer], count: int) -> list[Buffer]:
    """What is left of them behind their first ``count`` bytes."""
    for number, buffer in enumerate(buffers):
        if count < len(buffer):
            return [memoryview(buffer)[count:], *buffers[number + 1 :]]
        count -= len(buffer)
    return []


def files_below(filesystem: fsspec.AbstractFileSystem, path: str) -> dict[str, int]:
    """Full path and bytes of each file; raises what the backend raises."""
    if is_local(filesystem):  # fsspec's walk skips what it cannot read, which would be a lie
        return dict(_walk(path, frozenset()))
    filesystem.invalidate_cache()
    found = filesystem.find(path, detail=True)
    return {
        str(name): int(info["size"])
        for name, info in found.items()
        if info["type"] == "file" and not str(name).endswith("/")  # a folder's placeholder
    }


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Follows links to folders, as on stores spread over disks, but not in circles."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            try:
                if entry.is_dir():
                    yield from _walk(entry.path, above | {here})
                else:
                    yield entry.path, entry.stat().st_size
            except FileNotFoundError:  # renamed or removed meanwhile
                continue
