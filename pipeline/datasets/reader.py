"""Read the encoded bytes of an image."""

from __future__ import annotations

import errno
import os
import zipfile
import zlib
from collections.abc import Callable

from pipeline.datasets.crop import BadImageError
from pipeline.datasets.listing import ImageItem
from pipeline.storage.files import file_size, is_local, open_url, read_ranges, redact
from pipeline.storage.local import open_regular, read_range
from schemas.errors import UserError, plain_text

Reader = Callable[[ImageItem], bytes]

UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError)
"""Errors of a single file; any other ``OSError`` is an error of the storage."""

MAX_BYTES = 256 << 20
"""Limit of one encoded image: the uncompressed size of the largest image that Pillow decodes.
Threads hold several in memory."""


class FileReader:
    """Reads items below a source folder or URL; thread-safe."""

    def __init__(self, source: str) -> None:
        self.filesystem, self.root = open_url(source, what="--source")

    def __call__(self, item: ImageItem) -> bytes:
        """The encoded image. Raises ``BadImageError`` if it is larger than ``MAX_BYTES`` or in
        something else than a regular file, ``OSError`` if the file cannot be read, ``StorageError``
        if storage stays unavailable, ``UserError`` if it sends another number of bytes."""
        path = f"{self.root}/{item.path}".rstrip("/")
        if item.length is not None and item.length > MAX_BYTES:
            raise _too_large(item.length)
        if is_local(self.filesystem):  # here errors of the file and of the disk can be told apart
            return _read_local(path, item)
        length = MAX_BYTES + 1 if item.length is None else item.length
        ranges = [(item.offset, item.offset + length)]
        try:
            (part,) = read_ranges(self.filesystem, path, ranges)
        except KeyError:  # of fsspec's archives
            raise BadImageError("a link to a file that its archive lacks") from None
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise BadImageError(f"damaged in its archive ({plain_text(str(error))})") from None
        if item.length is not None and len(part) != item.length:
            raise UserError(
                f"'{redact(path)}': {len(part)} bytes came instead of the {item.length} of sample "
                f"'{item.key}': the file has changed, or its server does not support ranges"
            )
        if len(part) > MAX_BYTES:
            raise _too_large(file_size(self.filesystem, path))
        return part


def _read_local(path: str, item: ImageItem) -> bytes:
    with open_regular(path) as descriptor:
        if descriptor is None:
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            raise BadImageError("a pipe or a device, not a file")
        if item.length is not None:
            return read_range(descriptor, item.offset, item.offset + item.length)
        size = os.fstat(descriptor).st_size
        if size > MAX_BYTES:
            raise _too_large(size)
        return read_range(descriptor, item.offset, size)


def _too_large(size: int) -> BadImageError:
    return BadImageError(f"has {size} bytes; the limit is {MAX_BYTES}")
