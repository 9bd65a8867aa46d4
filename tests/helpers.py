"""Stores of known values, edits that damage them, and a recorder of opened files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline.store import ShardWriter, Store
from schemas.store import Manifest
from tests.stores import random_manifest

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler here",
)

Values = dict[str, dict[str, np.ndarray | int]]

SIZES = (5, 3, 0, 4)
"""Samples of each shard of `known_store`: uneven, one of them empty."""


def known_manifest(sizes: Sequence[int] = SIZES) -> Manifest:
    """Manifest of a store with shards of these sizes; smaller ones have skipped images."""
    largest = max(sizes)
    return random_manifest(len(sizes) * largest, largest)


def known_values(shard: int, row: int) -> Values:
    """Values of the sample at (shard, row): a pure function, exact in float16."""
    manifest = known_manifest((1,))
    rng = np.random.default_rng([shard, row])

    def column(stream: str, name: str) -> np.ndarray:
        shape = manifest.streams[stream].columns[name].shape
        return rng.standard_normal(shape).astype(np.float16)

    maps = {name: column("maps", name) for name in manifest.streams["maps"].columns}
    latents: dict[str, np.ndarray | int] = {n: column("latents", n) for n in ("mean", "std")}
    return {"latents": {**latents, "label": 100 * shard + row}, "maps": {**maps}}


def known_key(shard: int, row: int) -> str:
    return f"class/{shard}-{row}"


def write_known_shard(url: str, manifest: Manifest, shard: int, samples: int) -> None:
    with ShardWriter(url, manifest, shard) as writer:
        for row in range(samples):
            writer.add(known_key(shard, row), known_values(shard, row))
        writer.commit()


def write_known_store(url: str, sizes: Sequence[int] = SIZES) -> Store:
    """Write a complete store of `known_values`."""
    store = Store.create(url, known_manifest(sizes))
    for shard, samples in enumerate(sizes):
        write_known_shard(store.url, store.manifest, shard, samples)
    store.finish()
    return store


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, record or index in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def all_files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@contextmanager
def recorded_opens() -> Iterator[list[str]]:
    """Yield a list of all paths that any thread opens with a local fsspec filesystem or with
    ``os.open``, which reads rows directly into arrays."""
    paths: list[str] = []
    original, os_open = LocalFileSystem._open, os.open

    def open_and_record(self: LocalFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        paths.append(str(path))
        return original(self, path, *args, **kwargs)

    def os_open_and_record(path: Any, *args: Any, **kwargs: Any) -> int:
        paths.append(str(path))
        return os_open(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFileSystem, "_open", open_and_record)
        patch.setattr(os, "open", os_open_and_record)
        yield paths
