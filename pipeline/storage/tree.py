"""Every file below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import fsspec

from pipeline.storage.connection import is_local


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
