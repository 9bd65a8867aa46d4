"""Writes tars that stock webdataset reads; the bytes are the same on every run."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.store.arrays import StoredArray, member_suffix, npy_member
from pipeline.store.checksums import extend
from pipeline.store.layout import tar_path
from schemas.store import Checksum, StreamFile

BLOCK = 512


class TarWriter:
    """Writes one stream of one shard as a local tar, and the file's entry for the commit record."""

    def __init__(
        self,
        path: Path,
        stream: str,
        shard: int,
        parts: Mapping[str, StoredArray],
        checksum: Checksum,
    ) -> None:
        self._checksum = checksum
        self.path = path
        self.final = tar_path(stream, shard)
        self.parts = parts
        self._file = _HashingFile(path)
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)
        self._offsets: dict[str, list[int]] = {}
        self._sizes: dict[str, list[int]] = {}
        self._crc32: dict[str, list[int]] = {}

    def add(self, key: str, values: Mapping[str, np.ndarray]) -> None:
        """Append the next sample: an array for each part."""
        for name, part in self.parts.items():
            data = npy_member(part, values[name])
            info = tarfile.TarInfo(f"{key}.{member_suffix(name, part)}")
            info.size = len(data)  # owner, mode and time keep tarfile's constant defaults
            self._tar.addfile(info, io.BytesIO(data))
            padded = -(-len(data) // BLOCK) * BLOCK
            self._offsets.setdefault(name, []).append(self._tar.offset - padded)
            self._sizes.setdefault(name, []).append(len(data))
            self._crc32.setdefault(name, []).append(extend(self._checksum, 0, data))

    def finish(self) -> list[tuple[Path, StreamFile]]:
        """Close and flush to disk. Returns the local file and its entry in the commit record."""
        self._tar.close()
        self._file.sync_and_close()
        info = StreamFile(
            file=self.final,
            bytes=self._file.written,
            sha256=self._file.digest.hexdigest(),
            offsets={name: self._offsets.get(name, []) for name in self.parts},
            sizes={name: self._sizes.get(name, []) for name in self.parts},
            crc32={name: self._crc32.get(name, []) for name in self.parts},
        )
        return [(self.path, info)]

    def abandon(self) -> None:
        """Remove the local file."""
        self._file.sync_and_close()
        self.path.unlink(missing_ok=True)


class _HashingFile(io.RawIOBase):
    """A file that hashes what is written, so that a shard need not be read again for that."""

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
