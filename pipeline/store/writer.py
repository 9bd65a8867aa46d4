"""Writes one shard: every stream under a temporary name, then published, then committed."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.storage.files import TEMPORARY, is_local, open_url, publish, write_atomic
from pipeline.store.arrays import check_value, stream_parts
from pipeline.store.layout import commit_path
from pipeline.store.tar_writer import TarWriter
from pipeline.store.zarr_writer import ZarrWriter
from schemas.store import STORE_VERSION, CommitRecord, Manifest, RecordedCaptions, SkippedImage
from schemas.streams import LENGTHS

Values = Mapping[str, Mapping[str, Any]]
"""stream -> part name -> one sample's array, as ``encode_column`` returns them."""


class ShardWriter:
    """Writes one shard of all streams that are committed together. A context manager: leaving it
    without ``commit`` removes its files.

    One process writes a shard at a time. If two do (a requeued task whose first actor was still
    alive), they publish identical files, so that either order of renames is correct.
    """

    def __init__(
        self, url: str, manifest: Manifest, shard: int, *, added: str | None = None
    ) -> None:
        """``added``: write only this stream, to a store that has the others."""
        self.shard = shard
        self.added = added
        names = list(manifest.base_streams) if added is None else [added]
        self.parts = {name: stream_parts(manifest.streams[name].columns) for name in names}
        self._manifest = manifest
        self._filesystem, self._root = open_url(url, what="--store")
        self._keys: list[str] = []
        self._scratch: Path | None = None
        self._writers: dict[str, TarWriter | ZarrWriter] = {}
        self._lengths: dict[str, list[np.ndarray]] = {
            name: [] for name in names if name in manifest.text_streams
        }

    def __enter__(self) -> ShardWriter:
        if not is_local(self._filesystem):
            self._scratch = Path(tempfile.mkdtemp(prefix="haste-shard-"))
        for name in self.parts:
            folder = self._scratch or Path(self._root) / name
            folder.mkdir(parents=True, exist_ok=True)
            self._writers[name] = self._open(name, folder, f"{TEMPORARY}{uuid.uuid4().hex}")
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.abandon()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def add(self, key: str, values: Values) -> None:
        """Append one sample. Raises ``ValueError`` naming the sample and the array."""
        checked: dict[str, dict[str, np.ndarray]] = {}
        for name, parts in self.parts.items():
            checked[name] = {}
            for array, part in parts.items():
                try:
                    checked[name][array] = check_value(part, values[name][array])
                except ValueError as error:
                    raise ValueError(f"sample '{key}', {name}.{array}: {error}") from None
        for name, writer in self._writers.items():
            writer.add(key, checked[name])
        for name, lengths in self._lengths.items():
            lengths.append(checked[name][LENGTHS])
        self._keys.append(key)

    def commit(self, skipped: Sequence[SkippedImage] = ()) -> CommitRecord:
        """Publish the files under their final names, then the commit record. Returns the record."""
        streams = {}
        for name, writer in self._writers.items():
            files = writer.finish()
            streams[name] = tuple(info for _, info in files)
            for local, info in files:
                publish(self._filesystem, local, f"{self._root}/{info.file}")
        record = CommitRecord(
            version=STORE_VERSION,
            shard=self.shard,
            samples=len(self._keys),
            keys=self._keys,
            skipped=tuple(skipped),
            streams=streams,
            captions={name: self._recorded(name) for name in self._lengths},
        )
        path = f"{self._root}/{commit_path(self.shard, self.added)}"
        write_atomic(self._filesystem, path, record.model_dump_json().encode())
        return record

    def _recorded(self, stream: str) -> RecordedCaptions:
        """Captions of the samples, by their lengths."""
        limit = self._manifest.text_streams[stream].encoder.tokens
        lengths = self._lengths[stream]
        return RecordedCaptions(
            counts=[int((row > 0).sum()) for row in lengths],
            truncated=sum(int((row > limit).sum()) for row in lengths),
        )

    def _open(self, stream: str, folder: Path, temporary: str) -> TarWriter | ZarrWriter:
        parts, checksum = self.parts[stream], self._manifest.checksum
        if self._manifest.format == "zarr":
            size = self._manifest.shard_size
            prefix = f"{temporary}-"
            return ZarrWriter(folder, prefix, stream, self.shard, parts, size, checksum)
        return TarWriter(folder / temporary, stream, self.shard, parts, checksum)
