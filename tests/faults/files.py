"""Read access to folders and buckets that are being written and whose server may be down."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import fsspec

SHORT_TIMEOUTS = {
    "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 2, "read_timeout": 5}
}


def open_folder(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    options: dict[str, Any] = SHORT_TIMEOUTS if url.startswith("s3://") else {}
    filesystem, path = fsspec.url_to_fs(url, use_listings_cache=False, **options)
    return filesystem, str(path)


def names(url: str) -> list[str]:
    """Sorted names in a folder; empty where it is missing or cannot be listed now."""
    filesystem, path = open_folder(url)
    with suppress(Exception):  # every backend raises its own errors
        return sorted(str(p).rstrip("/").rpartition("/")[2] for p in filesystem.ls(path, False))
    return []


def read(url: str) -> bytes:
    """Bytes of a file; empty where it is missing or cannot be read now."""
    filesystem, path = open_folder(url)
    with suppress(Exception):
        data: bytes = filesystem.cat_file(path)
        return data
    return b""


def tree(url: str) -> dict[str, bytes]:
    """Bytes of every file below a folder, by relative path. Errors are raised."""
    filesystem, root = open_folder(url)
    if not filesystem.exists(root):
        return {}
    return {
        str(path)[len(root) :].lstrip("/"): filesystem.cat_file(path)
        for path in filesystem.find(root)
    }
