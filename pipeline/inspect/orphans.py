"""`--gc`: what crashes left behind in a store, and taking it away.

A file is garbage where its name is one that this project gives and nothing committed accounts for
it. Everything else that does not belong to the store is only told about.
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
from pipeline.text import describe_bytes
from schemas.errors import plain_text
from schemas.fields import COMMITS

NAME = r"[a-z][a-z0-9_]{0,63}"
RECORD = re.compile(rf"{COMMITS}/(?:(?P<stream>{NAME})/)?shard-(?P<shard>\d{{6,9}})\.json")
TAR = re.compile(rf"(?P<stream>{NAME})/shard-(?P<shard>\d{{6,9}})\.tar")
CHUNK = re.compile(rf"(?P<stream>{NAME})/{NAME}(?:\.{NAME})?/c/(?P<shard>\d+)(?:/0)*")
METADATA = re.compile(rf"(?P<stream>{NAME})/(?:{NAME}(?:\.{NAME})?/)?zarr\.json")
TAIL = re.compile(rf"(?P<stream>{NAME})_teacher_tail\.safetensors")
CHEAP_FILES = 20_000
"""A store of more files is listed only when asked to: object stores list a thousand at a time."""

SHOWN = 20
"""Unknown files on the page."""


class Leftover(NamedTuple):
    """A file that nothing committed accounts for."""

    path: str
    """Below the store's root."""
    bytes: int
    reason: str

    def __str__(self) -> str:
        return plain_text(f"{self.path}: {self.reason}")


@dataclass(frozen=True)
class Leftovers:
    """What a store's folder holds beside the store."""

    garbage: list[Leftover]
    """Ours by name, and to be removed."""
    unknown: list[Leftover]
    """Not ours to remove."""


class Collection(NamedTuple):
    """What became of the garbage."""

    removed: list[Leftover]
    kept: list[Leftover]
    """Too young, or committed in the meantime."""
    unknown: list[Leftover]

    def as_json(self) -> dict[str, object]:
        return {name: [f._asdict() for f in files] for name, files in self._asdict().items()}


def find_leftovers(store: Store) -> Leftovers:
    """From one listing of the store and those of its commit records; no file is read."""
    expected, streams = _expected(store), set(store.manifest.streams)
    found = {
        path[len(store.root) :].lstrip("/"): size
        for path, size in list_tree(store.filesystem, store.root).items()
    }
    matches = (how.fullmatch(path) for path in found for how in (RECORD, TAIL))
    traces = {match["stream"] for match in matches if match and match["stream"]}
    garbage, unknown = [], []
    for path, size in sorted(found.items()):
        if path in expected:
            continue
        link = _is_link(store, path)
        reason = None if link else _why(path, store, streams, traces - streams)
        if reason is not None:
            garbage.append(Leftover(path, size, reason))
        else:
            what = "behind a link" if link else "no file of the store"
            unknown.append(Leftover(path, size, f"{what}; left alone"))
    return Leftovers(garbage, unknown)


def collect(store: Store, *, hours: float) -> Collection:
    """Remove the garbage that is at least ``hours`` old.

    Ages are asked for one by one, just before each removal: a shard that an extraction makes anew
    under the same name is young again.
    """
    leftovers = find_leftovers(store)
    removed, kept = [], []
    for file in leftovers.garbage:
        age = _age_in_hours(store, file.path)
        if age is None or age < hours:
            told = "its age is unknown" if age is None else f"only {age:.1f} h old"
            kept.append(file._replace(reason=f"{file.reason}; {told}"))
            continue
        with contextlib.suppress(FileNotFoundError):  # what wrote it may be alive and done
            remove(store.filesystem, f"{store.root}/{file.path}")
        removed.append(file)
    return Collection(removed, kept, leftovers.unknown)


def is_cheap_to_list(store: Store) -> bool:
    """Whether a plain look at the store may list all of it."""
    parts = [len(stream_parts(stream.columns)) for stream in store.manifest.streams.values()]
    files = sum(parts) if store.manifest.format == "zarr" else len(parts)
    return store.manifest.num_shards * (files + 1) <= CHEAP_FILES


def _expected(store: Store) -> set[str]:
    """Every file that the manifest or the record of a committed shard accounts for."""
    manifest = store.manifest
    paths = {MANIFEST, INDEX, *store.zarr_metadata()}
    paths |= {s.tail.file for s in manifest.teacher_streams.values() if s.tail is not None}
    for added in (None, *store.added_streams):
        shards = store.committed_shards(added or "latents")
        paths |= {commit_path(shard, added) for shard in shards}
        for name in manifest.base_streams if added is None else (added,):
            if manifest.format != "zarr":
                paths |= {tar_path(name, shard) for shard in shards}
                continue
            for part, about in stream_parts(manifest.streams[name].columns).items():
                paths |= {chunk_path(name, part, n, len(about.shape)) for n in shards}
    return paths


def _why(path: str, store: Store, streams: set[str], gone: set[str]) -> str | None:
    """Why an unaccounted file is garbage; None where it may be anyone's. ``gone`` are streams that
    left a record or a tail: a folder of tars without either could be a person's own."""
    folder, _, name = path.rpartition("/")
    if name.startswith(TEMPORARY):
        known = folder.partition("/")[0] in {"", COMMITS, *streams, *gone}
        return "was being written when something died" if known else None
    for pattern in (RECORD, TAR, CHUNK, METADATA, TAIL):
        match = pattern.fullmatch(path)
        if match is None:
            continue
        stream, shard = match["stream"], match.groupdict().get("shard")
        if stream in gone:
            return f"the manifest has no stream '{stream}'"
        if stream is not None and stream not in streams:
            return None
        if shard is not None and int(shard) >= store.manifest.num_shards:
            return f"the store has only {store.manifest.num_shards} shards"
        return "no commit record accounts for it" if shard else "the manifest does not name it"
    return None


def _is_link(store: Store, path: str) -> bool:
    """Whether a file is a link or lies behind one, where it may belong to another store."""
    if not is_local(store.filesystem):
        return False
    parts = path.split("/")
    return any(os.path.islink("/".join([store.root, *parts[: n + 1]])) for n in range(len(parts)))


def _age_in_hours(store: Store, path: str) -> float | None:
    """Since the file was last written; None where the filesystem does not tell."""
    store.filesystem.invalidate_cache()  # object stores would answer from the listing
    try:
        written = store.filesystem.modified(f"{store.root}/{path}")
    except Exception:  # every fsspec backend raises its own types; what is in doubt is kept
        return None
    if not isinstance(written, datetime.datetime):
        return None
    if written.tzinfo is None:
        written = written.replace(tzinfo=datetime.UTC)
    return (datetime.datetime.now(datetime.UTC) - written).total_seconds() / 3600


def describe_collection(store: Store, done: Collection, *, hours: float) -> str:
    """The page that a person reads."""
    lines = [f"{store.shown_url}: removed {summed(done.removed)}"]
    lines += [f"  removed  {describe_bytes(file.bytes):>8}  {file}" for file in done.removed]
    if done.kept:
        lines.append(
            f"kept {summed(done.kept)} younger than {hours:g} h, which a running extraction may "
            "still need (--gc-age)"
        )
        lines += [f"  kept     {describe_bytes(file.bytes):>8}  {file}" for file in done.kept]
    shown = done.unknown[:SHOWN]
    lines += [f"  unknown  {describe_bytes(file.bytes):>8}  {file}" for file in shown]
    if len(done.unknown) > SHOWN:
        lines.append(f"  unknown  {summed(done.unknown[SHOWN:])} more")
    return "\n".join(lines)


def summed(files: Sequence[Leftover]) -> str:
    """``3 files, 12 kB``."""
    plural = "" if len(files) == 1 else "s"
    return f"{len(files)} file{plural}, {describe_bytes(sum(file.bytes for file in files))}"
