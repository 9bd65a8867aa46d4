"""Writing one shard: every stream to a temporary name, then published, then committed."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.files import TEMPORARY, is_local, open_url, publish, write_atomic
from pipeline.store.columns import encode, member_suffix
from pipeline.store.layout import commit_path, stream_path
from pipeline.store.tar import TarWriter
from schemas.store import CommitRecord, SkippedImage, Stream


class ShardWriter:
    """One shard of all streams. Use as a context: leaving it without ``commit`` removes its files.

    One process writes a shard at a time; two that do (a requeued task whose first actor was not
    dead) publish identical files, so either order of renames is right.
    """

    def __init__(self, url: str, streams: Mapping[str, Stream], shard: int) -> None:
        self.shard = shard
        self.streams = streams
        self._filesystem, self._root = open_url(url, what="--store")
        self._keys: list[str] = []
        self._scratch: Path | None = None
        self._tars: dict[str, TarWriter] = {}

    def __enter__(self) -> ShardWriter:
        if not is_local(self._filesystem):
            self._scratch = Path(tempfile.mkdtemp(prefix="haste-shard-"))
        for name in self.streams:
            folder = self._scratch or Path(self._root) / name
            folder.mkdir(parents=True, exist_ok=True)
            self._tars[name] = TarWriter(folder / f"{TEMPORARY}{uuid.uuid4().hex}")
        return self

    def __exit__(self, *_: object) -> None:
        for tar in self._tars.values():
            tar.abandon()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def add(self, key: str, values: Mapping[str, Mapping[str, np.ndarray | int]]) -> None:
        """Append ``values[stream][column]`` of one sample. Raises ``ValueError`` naming it."""
        for name, stream in self.streams.items():
            for column, spec in stream.columns.items():
                try:
                    data = encode(spec, values[name][column])
                except ValueError as error:
                    raise ValueError(f"sample '{key}', {name}.{column}: {error}") from None
                self._tars[name].add(column, f"{key}.{member_suffix(column, spec)}", data)
        self._keys.append(key)

    def commit(self, skipped: Sequence[SkippedImage] = ()) -> CommitRecord:
        """Publish the files under their final names, then the record that makes them exist."""
        files = {}
        for name, tar in self._tars.items():
            path = stream_path(name, self.shard)
            files[name] = tar.finish(path, list(self.streams[name].columns))
            publish(self._filesystem, tar.path, f"{self._root}/{path}")
        record = CommitRecord(
            shard=self.shard,
            samples=len(self._keys),
            keys=self._keys,
            skipped=tuple(skipped),
            streams=files,
        )
        path = f"{self._root}/{commit_path(self.shard)}"
        write_atomic(self._filesystem, path, record.model_dump_json().encode())
        return record
