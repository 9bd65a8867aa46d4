"""From an item to the bytes of its image."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.datasets.base import ImageItem
from pipeline.files import is_local, open_url, read_bytes, read_ranges

Reader = Callable[[ImageItem], bytes]

UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError)
"""What is wrong with one file; any other ``OSError`` is the storage's."""


class FileReader:
    """Reads items below a source folder or URL; safe to share between threads."""

    def __init__(self, source: str) -> None:
        self.filesystem, self.root = open_url(source, what="--source")

    def __call__(self, item: ImageItem) -> bytes:
        """The encoded image. Raises ``OSError`` where the file cannot be read, ``StorageError``
        where storage stays away."""
        path = f"{self.root}/{item.path}".rstrip("/")
        if is_local(self.filesystem):  # where a file's own trouble is told from the disk's
            end = None if item.length is None else item.offset + item.length
            start = None if item.length is None else item.offset
            data: bytes = self.filesystem.cat_file(path, start=start, end=end)
            return data
        if item.length is None:
            return read_bytes(self.filesystem, path)
        (part,) = read_ranges(self.filesystem, path, [(item.offset, item.offset + item.length)])
        return part
