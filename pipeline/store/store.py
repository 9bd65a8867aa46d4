"""The store: opening and creating it, its commit records and its index."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from pipeline.storage.conditional import update_file, write_new
from pipeline.storage.files import (
    absolute_url,
    exists,
    list_folder,
    open_url,
    read_at_most,
    redact,
    write_atomic,
)
from pipeline.storage.redaction import without_secrets
from pipeline.store.arrays import check_columns, stream_parts
from pipeline.store.errors import UncommittedShardError
from pipeline.store.layout import INDEX, MANIFEST, commit_folder, commit_path
from pipeline.store.manifest_diff import require_equal
from schemas.errors import UserError, plain_text
from schemas.store import STORE_VERSION, CommitRecord, Manifest, SkippedImage, StoreIndex

M = TypeVar("M", bound=BaseModel)

MAX_CACHED_RECORDS = 128
"""Commit records that a store caches; a record of 64 samples takes about 60 KB."""
MAX_BYTES = 1 << 28
"""Size of a manifest, a commit record or an index; a skipped image takes about 200 bytes."""


class Store:
    """A store at an fsspec URL: its manifest and the records of its committed shards."""

    def __init__(self, url: str, manifest: Manifest) -> None:
        self.url = absolute_url(url)
        self.shown_url = redact(self.url)
        self.manifest = manifest
        self.filesystem, self.root = open_url(self.url, what="--store")
        self._record = lru_cache(maxsize=MAX_CACHED_RECORDS)(self._read_record)
        self._record_locks = [threading.RLock() for _ in range(16)]

    @staticmethod
    def exists(url: str) -> bool:
        """True if there is a manifest. Raises ``UserError`` when the URL cannot be reached."""
        filesystem, root = open_url(absolute_url(url), what="--store")
        try:
            return exists(filesystem, f"{root}/{MANIFEST}")
        except Exception as error:  # every fsspec backend raises its own types
            raise _unreachable(url, error) from None

    @staticmethod
    def open(url: str) -> Store:
        """The store at ``url``. Raises ``UserError`` when there is none or it cannot be read."""
        filesystem, root = open_url(absolute_url(url), what="--store")
        try:
            text = read_at_most(filesystem, f"{root}/{MANIFEST}", MAX_BYTES + 1)
        except FileNotFoundError:
            raise UserError(
                f"--store '{redact(url)}' holds no store: {MANIFEST} is missing"
            ) from None
        except Exception as error:  # every fsspec backend raises its own types
            raise _unreachable(url, error) from None
        where = f"{redact(url)}/{MANIFEST}"
        manifest = _parse(Manifest, text, where)
        for name, stream in manifest.streams.items():
            try:
                check_columns(stream.columns)
            except ValueError as error:
                raise UserError(f"{where} is damaged: stream '{name}', {error}") from None
        return Store(url, manifest)

    @staticmethod
    def create(url: str, manifest: Manifest) -> Store:
        """Write the manifest of a new store. If another command was first, the store is opened with
        the manifest that this one has written: callers compare it, as on a resume."""
        store = Store(url, manifest)
        path = f"{store.root}/{MANIFEST}"
        try:
            created = write_new(store.filesystem, path, _as_json(manifest))
            if created:
                store._write_zarr_metadata(None)
        except Exception as error:  # every fsspec backend raises its own types
            raise _unreachable(url, error) from None
        return store if created else Store.open(url)

    def update(self, change: Callable[[Manifest], Manifest]) -> Store:
        """Replace the manifest by ``change(manifest)`` and return the store with it. Changes that
        other commands make at the same time are all made; ``change`` may be called again."""
        updated = self.manifest

        def rewrite(data: bytes | None) -> bytes:
            nonlocal updated
            if data is None:
                raise UserError(f"'{self.shown_url}/{MANIFEST}' was deleted in the meantime")
            current = _parse(Manifest, data, f"{self.shown_url}/{MANIFEST}")
            updated = change(current)
            return data if updated == current else _as_json(updated)

        update_file(self.filesystem, f"{self.root}/{MANIFEST}", rewrite)
        store = Store(self.url, updated)
        if updated.format == "zarr":
            complete = store.has_index()
            store._write_zarr_metadata(store.index().samples_per_shard if complete else None)
        return store

    def committed_shards(self, stream: str = "latents") -> set[int]:
        """Numbers of the committed shards of ``stream``, by listing their records."""
        paths = list_folder(self.filesystem, f"{self.root}/{commit_folder(self._added(stream))}")
        names = (re.fullmatch(r".*/shard-(\d{6,9})\.json", path) for path in paths)
        numbers = {int(name[1]) for name in names if name is not None}
        return {number for number in numbers if number < self.manifest.num_shards}

    def missing_shards(self, stream: str = "latents") -> list[int]:
        """Planned shards without a commit record of ``stream``."""
        committed = self.committed_shards(stream)
        return [shard for shard in range(self.manifest.num_shards) if shard not in committed]

    def require_complete(self, *streams: str) -> None:
        """Raises ``UserError`` when a planned shard has no commit record of one of ``streams``
        (default: those extracted with the latents)."""
        for stream in streams or ("latents",):
            missing = self.missing_shards(stream)
            if missing:
                what = f"stream '{stream}' of store" if self._added(stream) else "store"
                raise UserError(
                    f"{what} '{self.shown_url}' is not complete: {len(missing)} of "
                    f"{self.manifest.num_shards} shards are missing (first: {missing[0]}); "
                    "run its extraction or conversion again"
                )

    def has_index(self) -> bool:
        """True if ``finish`` was called at least once."""
        return exists(self.filesystem, f"{self.root}/{INDEX}")

    def reason(self, error: Exception) -> str:
        """An error of the filesystem in one line, without credentials."""
        return _reason(self.url, error)

    def index(self) -> StoreIndex:
        """Sample counts of a complete store. Raises ``UserError`` when shards are missing."""
        path = f"{self.root}/{INDEX}"
        try:
            text = read_at_most(self.filesystem, path, MAX_BYTES + 1)
        except FileNotFoundError:
            self.require_complete()
            return self.build_index()
        index = _parse(StoreIndex, text, f"{self.shown_url}/{INDEX}")
        counts = index.samples_per_shard
        fits = max(counts, default=0) <= self.manifest.shard_size
        known = index.bytes_per_stream.keys()
        fits &= self.manifest.base_streams.keys() <= known <= self.manifest.streams.keys()
        if len(counts) != self.manifest.num_shards or not fits:
            raise UserError(
                f"{self.shown_url}/{INDEX} does not fit its manifest; delete it and "
                "run the extraction again"
            )
        return index

    def build_index(self) -> StoreIndex:
        """Sum up the commit records of all committed shards."""
        counts = []
        sizes = dict.fromkeys(self.manifest.streams, 0)
        base = self.committed_shards()
        for added in (None, *self.added_streams):
            # an added shard counts only if its base shard exists
            shards = base if added is None else base & self.committed_shards(added)
            for shard in sorted(shards):
                record = self.record(shard, added or "latents")
                if added is None:
                    counts.append(record.samples)
                for name, files in record.streams.items():
                    sizes[name] += sum(file.bytes for file in files)
        return StoreIndex(version=STORE_VERSION, samples_per_shard=counts, bytes_per_stream=sizes)

    def finish(
        self, empty_classes: Callable[[Collection[str]], Sequence[int]] | None = None
    ) -> None:
        """Write the index and the list of skipped images; called after the last commit.
        ``empty_classes`` gives all classes without stored images from the keys of skipped ones.
        Raises ``UserError`` if another command has replaced the manifest since this store was
        opened."""
        skipped: list[SkippedImage] = []
        for shard in range(self.manifest.num_shards):
            skipped.extend(self.record(shard).skipped)
        opened = self.manifest
        changed: dict[str, object] = {"skipped": tuple(skipped)}
        truncated = self._truncated_captions()
        if empty_classes is not None:
            empty = tuple(empty_classes({image.key for image in skipped}))
            changed["dataset"] = opened.dataset.model_copy(update={"empty_classes": empty})

        def complete(current: Manifest) -> Manifest:
            added = current.streams.keys() - opened.streams.keys()
            require_equal(
                current,
                opened,
                [
                    *("skipped", "dataset.empty_classes"),
                    *(f"streams.{name}" for name in added),
                    *(f"streams.{name}.truncated" for name in opened.text_streams),
                ],
                where=f"store '{self.shown_url}'",
                what="this command",
                remedy="another command has replaced its manifest; delete the store and run one of "
                "them again",
            )
            streams = {
                name: stream.model_copy(update={"truncated": truncated[name]})
                if name in truncated
                else stream
                for name, stream in current.streams.items()
            }
            return current.model_copy(update={**changed, "streams": streams})

        self.update(complete)

        def index(_: bytes | None) -> bytes:
            """Built after the old one was read, so that the last writer has seen all commits."""
            self.manifest = Store.open(self.url).manifest
            built = self.build_index()
            self._write_zarr_metadata(built.samples_per_shard)
            return built.model_dump_json().encode()

        update_file(self.filesystem, f"{self.root}/{INDEX}", index)

    def _truncated_captions(self) -> dict[str, int]:
        """Truncated captions of each complete stream of captions, by its commit records."""
        found = {}
        for name in self.manifest.text_streams:
            if not self.missing_shards(name):
                records = (self.record(n, name) for n in range(self.manifest.num_shards))
                found[name] = sum(record.captions[name].truncated for record in records)
        return found

    def record(self, shard: int, stream: str = "latents") -> CommitRecord:
        """The commit record of a shard of ``stream``. Raises ``UncommittedShardError`` when there
        is none, ``UserError`` when it does not belong to this store."""
        with self._record_locks[shard % len(self._record_locks)]:  # one thread reads a record
            return self._record(shard, self._added(stream))

    def _added(self, stream: str) -> str | None:
        """The stream's name if it has its own commit records, else None."""
        return None if stream in self.manifest.base_streams else stream

    @property
    def added_streams(self) -> list[str]:
        """Streams added after the latents, with their own commit records."""
        return [name for name in self.manifest.streams if self._added(name)]

    def _read_record(self, shard: int, added: str | None) -> CommitRecord:
        path = commit_path(shard, added)
        where = f"{self.shown_url}/{path}"
        try:
            text = read_at_most(self.filesystem, f"{self.root}/{path}", MAX_BYTES + 1)
        except FileNotFoundError:
            raise UncommittedShardError(
                f"{where} is missing: the shard was never committed; run the extraction or "
                "conversion again"
            ) from None
        record = _parse(CommitRecord, text, where)
        streams = self.manifest.base_streams.keys() if added is None else {added}
        if record.shard != shard or record.streams.keys() != streams:
            raise UserError(f"{where} does not belong to this store")
        captions = self.manifest.text_streams.keys() & streams
        if record.captions.keys() != captions:
            raise UserError(f"{where} lists captions of other streams than the store has")
        if added is not None:
            _check_same_samples(record, self.record(shard), where)
        return record

    def _write_zarr_metadata(self, samples_per_shard: Sequence[int] | None) -> None:
        for path, data in self.zarr_metadata(samples_per_shard).items():
            write_atomic(self.filesystem, f"{self.root}/{path}", data)

    def zarr_metadata(self, samples_per_shard: Sequence[int] | None = None) -> dict[str, bytes]:
        """Contents of every ``zarr.json`` by path; empty for a store of tars. ``samples_per_shard``
        is that of a complete store."""
        if self.manifest.format != "zarr":
            return {}
        from pipeline.store.zarr_writer import metadata_files  # zarr is slow to import

        return metadata_files(
            {name: stream_parts(s.columns) for name, s in self.manifest.streams.items()},
            shard_size=self.manifest.shard_size,
            num_shards=self.manifest.num_shards,
            samples_per_shard=samples_per_shard,
        )


def _check_same_samples(record: CommitRecord, base: CommitRecord, where: str) -> None:
    """Raises ``UserError`` naming the first sample that differs from the base streams."""
    if record.keys == base.keys:
        return
    row = next(
        (row for row, (a, b) in enumerate(zip(record.keys, base.keys, strict=False)) if a != b),
        min(record.samples, base.samples),
    )

    def name(keys: list[str]) -> str:
        return f"'{keys[row]}'" if row < len(keys) else "none"

    raise UserError(
        f"{where} lists other samples than the store's first streams: sample {row} is "
        f"{name(record.keys)}, not {name(base.keys)}"
    )


def _parse(model: type[M], text: bytes, where: str) -> M:
    if len(text) > MAX_BYTES:
        raise UserError(f"{where} is damaged: it is longer than {MAX_BYTES >> 20} MB")
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        version = _version_of(text)
        if version > STORE_VERSION:
            raise UserError(
                f"{where} is of version {version}, newer than this software knows "
                f"({STORE_VERSION}); update it"
            ) from None
        if 0 < version < STORE_VERSION:
            raise UserError(
                f"{where} is of version {version}, from before the first release; extract the "
                "store anew"
            ) from None
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        reason = plain_text(f"{key}: {message}" if key else message)[:300]  # keys are untrusted
        raise UserError(f"{where} is damaged: {reason}") from None


def _as_json(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=1).encode()


def _version_of(text: bytes) -> int:
    """The version that a JSON file declares; 0 if it declares none."""
    try:
        values = from_json(text)
    except ValueError:
        return 0
    version = values.get("version") if isinstance(values, dict) else None
    return version if type(version) is int else 0


def _unreachable(url: str, error: Exception) -> UserError:
    return UserError(f"--store '{redact(url)}' cannot be reached: {_reason(url, error)}")


def _reason(url: str, error: Exception) -> str:
    return plain_text(without_secrets(str(error), url))[:200] or type(error).__name__
