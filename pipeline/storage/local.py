"""Local files as what they may turn out to be: a pipe, a device or a folder among them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager


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
