"""Tars that stock webdataset reads and that come out the same byte for byte on every run."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from pathlib import Path

from schemas.store import StreamFile

BLOCK = 512


class TarWriter:
    """Writes members to a local file and keeps the index that its commit record will hold."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _HashingFile(path)
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)
        self._offsets: dict[str, list[int]] = {}
        self._sizes: dict[str, list[int]] = {}
        self._crc32: dict[str, list[int]] = {}

    def add(self, column: str, member: str, data: bytes) -> None:
        """Append one member, the next sample's ``column``."""
        info = tarfile.TarInfo(member)  # owner, mode and time are tarfile's constants
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        padded = -(-len(data) // BLOCK) * BLOCK
        self._offsets.setdefault(column, []).append(self._tar.offset - padded)
        self._sizes.setdefault(column, []).append(len(data))
        self._crc32.setdefault(column, []).append(zlib.crc32(data))

    def finish(self, file: str, columns: list[str]) -> StreamFile:
        """Close, flush to disk, and describe the file; ``file`` is its final path in the store."""
        self._tar.close()
        self._file.sync_and_close()
        return StreamFile(
            file=file,
            bytes=self._file.written,
            sha256=self._file.digest.hexdigest(),
            offsets={column: self._offsets.get(column, []) for column in columns},
            sizes={column: self._sizes.get(column, []) for column in columns},
            crc32={column: self._crc32.get(column, []) for column in columns},
        )

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.sync_and_close()
        self.path.unlink(missing_ok=True)


class _HashingFile(io.RawIOBase):
    """A file that hashes what goes through it, so that no shard is read again to be checksummed."""

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self.written = 0
        self._out = path.open("wb")

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.digest.update(data)
        self.written += len(data)
        return self._out.write(data)

    def tell(self) -> int:
        return self.written

    def sync_and_close(self) -> None:
        if not self._out.closed:
            self._out.flush()
            os.fsync(self._out.fileno())
            self._out.close()
