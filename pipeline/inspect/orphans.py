"""`--gc`: find and remove orphans, the files of a store that crashes leave without a commit record.

A file is an orphan if its name is one that this project gives and neither the manifest nor a commit
record lists it. All other files that do not belong to the store are only reported.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.storage.files import TEMPORARY, is_local, list_tree, remove
from pipeline.store import Store
from pipeline.store.arrays import stream_parts
from pipeline.store.layout import INDEX, MANIFEST, chunk_path, commit_path, tar_path
from pipeline.text import describe_bytes, describe_hours
from schemas.errors import plain_text
from schemas.fields import COMMITS

NAME = r"[a-z][a-z0-9_]{0,63}"
RECORD = re.compile(rf"{COMMITS}/(?:(?P<stream>{NAME})/)?shard-(?P<shard>\d{{6,9}})\.json")
TAR = re.compile(rf"(?P<stream>{NAME})/shard-(?P<shard>\d{{6,9}})\.tar")
CHUNK = re.compile(rf"(?P<stream>{NAME})/{NAME}(?:\.{NAME})?/c/(?P<shard>\d+)(?:/0)*")
METADATA = re.compile(rf"(?P<stream>{NAME})/(?:{NAME}(?:\.{NAME})?/)?zarr\.json")
TAIL = re.compile(rf"(?P<stream>{NAME})_(?:teacher_tail|null)\.safetensors")
MAX_LISTED_FILES = 20_000
"""Files of a store that is listed without --gc: object stores list a thousand per request."""
MAX_SHOWN = 20
"""Unknown files on the page."""


class Orphan(NamedTuple):
    """A file that neither the manifest nor a commit record accounts for."""

    path: str
    """Relative to the store's root."""
    bytes: int
    reason: str

    def __str__(self) -> str:
        return plain_text(f"{self.path}: {self.reason}")


@dataclass(frozen=True)
class Orphans:
    """Files in a store's folder that do not belong to the store."""

    removable: list[Orphan]
    """Files with a name that this project gives."""
    unknown: list[Orphan]
    """Links and files of other names, which are never removed."""


class Removal(NamedTuple):
    """Result of ``remove_orphans``; the field names are the keys of ``--json``."""

    removed: list[Orphan]
    kept: list[Orphan]
    """Too young, or of unknown age."""
    unknown: list[Orphan]

    def as_json(self) -> dict[str, object]:
        return {name: [f._asdict() for f in files] for name, files in self._asdict().items()}


def find_orphans(store: Store) -> Orphans:
    """Lists the store and its commit records; reads no file."""
    expected, streams = _accounted_files(store), set(store.manifest.streams)
    found = {
        path[len(store.root) :].lstrip("/"): size
        for path, size in list_tree(store.filesystem, store.root).items()
    }
    matches = (pattern.fullmatch(path) for path in found for pattern in (RECORD, TAIL))
    named = {match["stream"] for match in matches if match and match["stream"]}
    removable, unknown = [], []
    for path, size in sorted(found.items()):
        if path in expected:
            continue
        link = _is_link(store, path)
        reason = None if link else _orphan_reason(path, store, streams, named - streams)
        if reason is not None:
            removable.append(Orphan(path, size, reason))
        else:
            kind = "a link or in a linked folder" if link else "not a file of the store"
            unknown.append(Orphan(path, size, f"{kind}; not removed"))
    return Orphans(removable, unknown)


def remove_orphans(store: Store, *, hours: float) -> Removal:
    """Remove the orphans that are at least ``hours`` old.

    The age of each file is read just before its removal, because a running extraction may have
    written the shard again under the same name.
    """
    orphans = find_orphans(store)
    removed, kept = [], []
    for file in orphans.removable:
        age = _age_in_hours(store, file.path)
        if age is None or age < hours:
            age_text = "its age is unknown" if age is None else f"only {describe_hours(age, 2)} old"
            kept.append(file._replace(reason=f"{file.reason}; {age_text}"))
            continue
        with contextlib.suppress(FileNotFoundError):  # its writer may have renamed it
            remove(store.filesystem, f"{store.root}/{file.path}")
        removed.append(file)
    return Removal(removed, kept, orphans.unknown)


def is_cheap_to_list(store: Store) -> bool:
    """True if the store has few enough files to be listed without --gc."""
    parts = [len(stream_parts(stream.columns)) for stream in store.manifest.streams.values()]
    files = sum(parts) if store.manifest.format == "zarr" else len(parts)
    return store.manifest.num_shards * (files + 1) <= MAX_LISTED_FILES


def _accounted_files(store: Store) -> set[str]:
    """Every file that the manifest or the record of a committed shard accounts for."""
    manifest = store.manifest
    paths = {MANIFEST, INDEX, *store.zarr_metadata()}
    paths |= {file.file for file in manifest.weights_files.values()}
    for added in (None, *store.added_streams):
        shards = store.committed_shards(added or "latents")
        paths |= {commit_path(shard, added) for shard in shards}
        for name in manifest.base_streams if added is None else (added,):
            if manifest.format != "zarr":
                paths |= {tar_path(name, shard) for shard in shards}
                continue
            for part, array in stream_parts(manifest.streams[name].columns).items():
                paths |= {chunk_path(name, part, n, len(array.shape)) for n in shards}
    return paths


def _orphan_reason(
    path: str, store: Store, streams: set[str], former_streams: set[str]
) -> str | None:
    """Reason why a file is an orphan; None where it may belong to the user. ``former_streams`` are
    not in the manifest but have a commit record or a tail: without either, a folder of tars may be
    the user's own."""
    folder, _, name = path.rpartition("/")
    if name.startswith(TEMPORARY):
        known = folder.partition("/")[0] in {"", COMMITS, *streams, *former_streams}
        return "temporary file of an interrupted writer" if known else None
    for pattern in (RECORD, TAR, CHUNK, METADATA, TAIL):
        match = pattern.fullmatch(path)
        if match is None:
            continue
        stream, shard = match["stream"], match.groupdict().get("shard")
        if stream in former_streams:
            return f"the manifest has no stream '{stream}'"
        if stream is not None and stream not in streams:
            return None
        if shard is not None and int(shard) >= store.manifest.num_shards:
            return f"the store has only {store.manifest.num_shards} shards"
        return "not listed in a commit record" if shard else "the manifest does not name it"
    return None


def _is_link(store: Store, path: str) -> bool:
    """True for a file that is a link or in a linked folder: it may belong to another store."""
    if not is_local(store.filesystem):
        return False
    parts = path.split("/")
    return any(os.path.islink("/".join([store.root, *parts[: n + 1]])) for n in range(len(parts)))


def _age_in_hours(store: Store, path: str) -> float | None:
    """Hours since the file was last written; None if the filesystem does not report it."""
    store.filesystem.invalidate_cache()  # object stores answer from a cached listing
    try:
        written = store.filesystem.modified(f"{store.root}/{path}")
    except Exception:  # every fsspec backend raises its own types; the file is kept
        return None
    if not isinstance(written, datetime.datetime):
        return None
    if written.tzinfo is None:
        written = written.replace(tzinfo=datetime.UTC)
    return (datetime.datetime.now(datetime.UTC) - written).total_seconds() / 3600


def describe_removal(store: Store, done: Removal, *, hours: float) -> str:
    """The result as lines of text."""
    lines = [f"{store.shown_url}: removed {count_and_size(done.removed)}"]
    lines += [f"  removed  {describe_bytes(file.bytes):>8}  {file}" for file in done.removed]
    if done.kept:
        lines.append(
            f"kept {count_and_size(done.kept)} younger than {hours:g} h, which a running "
            "extraction may still need (--gc-age)"
        )
        lines += [f"  kept     {describe_bytes(file.bytes):>8}  {file}" for file in done.kept]
    shown = done.unknown[:MAX_SHOWN]
    lines += [f"  unknown  {describe_bytes(file.bytes):>8}  {file}" for file in shown]
    if len(done.unknown) > MAX_SHOWN:
        lines.append(f"  unknown  {count_and_size(done.unknown[MAX_SHOWN:])} more")
    return "\n".join(lines)


def count_and_size(files: Sequence[Orphan]) -> str:
    """``3 files, 12 kB``."""
    plural = "" if len(files) == 1 else "s"
    return f"{len(files)} file{plural}, {describe_bytes(sum(file.bytes for file in files))}"
