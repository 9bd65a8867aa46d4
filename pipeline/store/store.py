"""Opening and creating a store; which of its shards exist."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.files import absolute_url, open_url, read_bytes, without_credentials, write_atomic
from pipeline.store.layout import COMMITS, INDEX, MANIFEST, commit_path
from schemas.errors import UserError
from schemas.store import STORE_VERSION, CommitRecord, Manifest, SkippedImage, StoreIndex

M = TypeVar("M", bound=BaseModel)


class Store:
    """A store at an fsspec URL: its manifest and the records of its committed shards."""

    def __init__(self, url: str, manifest: Manifest) -> None:
        self.url = absolute_url(url)
        self.shown_url = without_credentials(self.url)
        self.manifest = manifest
        self.filesystem, self.root = open_url(self.url, what="--store")
        self.record = lru_cache(maxsize=1024)(self._read_record)

    @staticmethod
    def exists(url: str) -> bool:
        """Whether there is a manifest. Raises ``UserError`` where the URL cannot be reached."""
        filesystem, root = open_url(absolute_url(url), what="--store")
        try:
            return bool(filesystem.exists(f"{root}/{MANIFEST}"))
        except Exception as error:  # every fsspec backend raises its own types
            raise _unreachable(url, error) from None

    @staticmethod
    def open(url: str) -> Store:
        """The store at ``url``. Raises ``UserError`` where there is none or it cannot be read."""
        filesystem, root = open_url(absolute_url(url), what="--store")
        try:
            text = read_bytes(filesystem, f"{root}/{MANIFEST}")
        except FileNotFoundError:
            raise UserError(
                f"--store '{without_credentials(url)}' holds no store: {MANIFEST} is missing"
            ) from None
        except Exception as error:  # every fsspec backend raises its own types
            raise _unreachable(url, error) from None
        return Store(url, _parse(Manifest, text, f"{without_credentials(url)}/{MANIFEST}"))

    @staticmethod
    def create(url: str, manifest: Manifest) -> Store:
        """Write the manifest of a new store, or of one that is being completed."""
        store = Store(url, manifest)
        try:
            text = manifest.model_dump_json(indent=1).encode()
            write_atomic(store.filesystem, f"{store.root}/{MANIFEST}", text)
        except Exception as error:  # every fsspec backend raises its own types
            raise _unreachable(url, error) from None
        return store

    def committed_shards(self) -> set[int]:
        """Numbers of the shards that exist, by listing their records."""
        self.filesystem.invalidate_cache()
        try:
            paths = self.filesystem.ls(f"{self.root}/{COMMITS}", detail=False)
        except FileNotFoundError:
            return set()
        names = (re.fullmatch(r".*/shard-(\d{6,9})\.json", str(path)) for path in paths)
        return {int(name[1]) for name in names if name is not None}

    def missing_shards(self) -> list[int]:
        """Planned shards that have no commit record."""
        committed = self.committed_shards()
        return [shard for shard in range(self.manifest.num_shards) if shard not in committed]

    def require_complete(self) -> None:
        """Raises ``UserError`` where a planned shard has no commit record."""
        missing = self.missing_shards()
        if missing:
            raise UserError(
                f"store '{self.shown_url}' is not complete: {len(missing)} of "
                f"{self.manifest.num_shards} shards are missing (first: {missing[0]}); "
                "run its extraction again"
            )

    def index(self) -> StoreIndex:
        """Sample counts of a complete store. Raises ``UserError`` where shards are missing."""
        path = f"{self.root}/{INDEX}"
        try:
            text = read_bytes(self.filesystem, path)
        except FileNotFoundError:
            self.require_complete()
            return self.build_index()
        index = _parse(StoreIndex, text, f"{self.shown_url}/{INDEX}")
        counts = index.samples_per_shard
        fits = max(counts, default=0) <= self.manifest.shard_size
        if len(counts) != self.manifest.num_shards or not fits:
            raise UserError(
                f"{self.shown_url}/{INDEX} does not fit its manifest; delete it and "
                "run the extraction again"
            )
        return index

    def build_index(self) -> StoreIndex:
        """Sum up the commit records of all committed shards."""
        counts, sizes = [], dict.fromkeys(self.manifest.streams, 0)
        for shard in sorted(self.committed_shards()):
            record = self.record(shard)
            counts.append(record.samples)
            for name, file in record.streams.items():
                sizes[name] += file.bytes
        return StoreIndex(samples_per_shard=counts, bytes_per_stream=sizes)

    def finish(self) -> None:
        """Called when the last shard is committed: write the index and list skipped images."""
        index = self.build_index()
        skipped: list[SkippedImage] = []
        for shard in range(self.manifest.num_shards):
            skipped.extend(self.record(shard).skipped)
        manifest = self.manifest.model_copy(update={"skipped": tuple(skipped)})
        if manifest != self.manifest:
            self.create(self.url, manifest)
            self.manifest = manifest
        write_atomic(self.filesystem, f"{self.root}/{INDEX}", index.model_dump_json().encode())

    def _read_record(self, shard: int) -> CommitRecord:
        where = f"{self.shown_url}/{commit_path(shard)}"
        try:
            text = read_bytes(self.filesystem, f"{self.root}/{commit_path(shard)}")
        except FileNotFoundError:
            raise UserError(f"{where} is missing: the shard was never committed") from None
        record = _parse(CommitRecord, text, where)
        if record.shard != shard or record.streams.keys() != self.manifest.streams.keys():
            raise UserError(f"{where} does not belong to this store")
        return record


def _parse(model: type[M], text: bytes, where: str) -> M:
    version = re.search(rb'"version":\s*(\d+)', text[:200])
    if version and int(version[1]) > STORE_VERSION:
        raise UserError(
            f"{where} is of version {int(version[1])}, newer than this software knows "
            f"({STORE_VERSION}); update it"
        )
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = f"{key}: {first['msg']}" if key else first["msg"]
        raise UserError(f"{where} is damaged: {' '.join(reason.split())}") from None


def _unreachable(url: str, error: Exception) -> UserError:
    reason = " ".join(without_credentials(str(error)).split())[:200] or type(error).__name__
    return UserError(f"--store '{without_credentials(url)}' cannot be reached: {reason}")
