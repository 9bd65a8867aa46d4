"""`--verify`: compare every file of a store with its commit record."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from pipeline.cli.progress import progress_bar
from pipeline.inspect.consistency import check_index, read_index, record_problems
from pipeline.inspect.file_check import Damage, check_file
from pipeline.storage.files import read_at_most
from pipeline.store import Store
from pipeline.store.layout import INDEX, MANIFEST, array_rows, commit_path
from schemas.errors import UserError
from schemas.store import StreamFile

MAX_METADATA = 1 << 20
"""Bytes of a zarr.json that are read; a valid one has 2 kB."""
MAX_SHOWN = 100
"""Lines of damage in the text; the JSON form lists all."""


@dataclass
class Verification:
    """Result for a store or a part of it."""

    verified: int = 0
    """Number of files that equal their records."""
    damaged: list[Damage] = field(default_factory=list)
    samples: dict[int, int] = field(default_factory=dict)
    """Samples by shard of the base streams, from the records."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes by stream, from the records."""

    def add(self, other: Verification) -> None:
        self.verified += other.verified
        self.damaged += other.damaged
        self.samples |= other.samples
        for stream, size in other.sizes.items():
            self.sizes[stream] = self.sizes.get(stream, 0) + size

    def as_json(self) -> dict[str, object]:
        return {"verified": self.verified, "damaged": [d._asdict() for d in self.damaged]}


def verify_store(store: Store, *, threads: int = 8) -> Verification:
    """Read every committed file once, ``threads`` files at a time, and continue after damage.
    A progress bar in bytes goes to stderr."""
    total = Verification()
    committed = {
        added: store.committed_shards(added) for added in ["latents", *store.added_streams]
    }
    with progress_bar(
        total=_expected_bytes(store), unit="B", unit_scale=True, desc="verify"
    ) as bar:
        checker = _Checker(store, bar.update)
        jobs: list[tuple[Callable[..., Verification], tuple[object, ...]]] = [
            (checker.shard, (shard, stream))
            for stream, shards in committed.items()
            for shard in sorted(shards)
        ]
        jobs += [(checker.weights_file, (name,)) for name in store.manifest.weights_files]
        pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
        try:
            for done in as_completed([pool.submit(check, *arguments) for check, arguments in jobs]):
                total.add(done.result())
        finally:
            pool.shutdown(cancel_futures=True)
    total.add(checker.zarr_metadata(total.samples))
    total.damaged.sort(key=lambda d: (d.shard is None, d.shard or 0, d.stream or "", d.file))
    index_damage = check_index(store, committed, total.samples, total.sizes, not total.damaged)
    total.damaged += index_damage
    total.verified += int(store.has_index() and not index_damage)
    return total


class _Checker:
    """Checks of parts of a store; may be shared between threads."""

    def __init__(self, store: Store, on_bytes: Callable[[int], object]) -> None:
        self.store = store
        self._on_bytes = on_bytes
        self._lock = threading.Lock()

    def shard(self, shard: int, stream: str) -> Verification:
        """Check one commit record and all files that it lists."""
        added = stream if stream in self.store.added_streams else None
        path = commit_path(shard, added)
        try:
            record = self.store.record(shard, stream)
        except UserError as error:
            problem = str(error).removeprefix(f"{self.store.shown_url}/{path} ")
            return Verification(damaged=[Damage(problem, path, added, shard)])
        found = Verification(
            sizes={name: sum(f.bytes for f in files) for name, files in record.streams.items()},
            damaged=[
                Damage(p, path, name, shard) for name, p in record_problems(self.store, record)
            ],
        )
        if added is None:
            found.samples[shard] = record.samples
        for name, files in record.streams.items():
            for file in files:
                damages = [
                    Damage(problem, file.file, name, shard, sample)
                    for sample, problem in self._check(file, record.keys)
                ]
                found.add(Verification(int(not damages), damages))
        return found

    def weights_file(self, stream: str) -> Verification:
        """Check the tail of a stream's teacher, or the null caption of a stream of captions."""
        tail = self.store.manifest.weights_files[stream]
        file = StreamFile(**tail.model_dump(), offsets={}, sizes={}, crc32={})
        damages = [Damage(problem, tail.file, stream) for _, problem in self._check(file, ())]
        return Verification(int(not damages), damages)

    def zarr_metadata(self, samples: Mapping[int, int]) -> Verification:
        """Check the metadata that zarr reads before the arrays against the manifest and ``samples``
        by shard."""
        found = Verification()
        for path, expected in self.store.zarr_metadata().items():
            try:
                held = read_at_most(
                    self.store.filesystem, f"{self.store.root}/{path}", MAX_METADATA
                )
                wrong = self._wrong_keys(json.loads(held), json.loads(expected), samples)
                problem = f"its {wrong[0]} does not follow from {MANIFEST}" if wrong else None
            except FileNotFoundError:
                problem = "is missing"
            except (ValueError, AttributeError, TypeError, LookupError, RecursionError):
                problem = "is not zarr metadata"
            except Exception as error:  # every fsspec backend raises its own types
                problem = f"cannot be read: {self.store.reason(error)}"
            if problem is None:
                found.verified += 1
            else:
                found.damaged.append(Damage(problem, path))
        return found

    def _wrong_keys(
        self, held: dict[str, Any], padded: dict[str, Any], samples: Mapping[int, int]
    ) -> list[str]:
        """Keys that are not those of the store.

        Arrays end with the last sample. They have rows for full shards (``padded``) in stores that
        are not complete or from an earlier version. Where the record of a shard cannot be read, the
        last sample is not known.
        """
        keys = ["node_type", "data_type", "chunk_grid", "codecs"]
        wrong = [key for key in keys if held.get(key) != padded.get(key)]
        shape, counts = padded.get("shape"), [samples.get(n, 0) for n in range(len(samples))]
        known = len(samples) == self.store.manifest.num_shards
        attributes = held.get("attributes") or {}
        if known and attributes.get("samples", sum(counts)) != sum(counts):
            wrong.insert(0, "attribute samples")
        if held.get("shape") != shape:
            if shape is None or held["shape"][1:] != shape[1:]:
                return ["shape", *wrong]
            rows = held["shape"][0]
            last = array_rows(counts, self.store.manifest.shard_size) if known else rows
            if not rows == last <= shape[0]:
                return ["shape", *wrong]
        return wrong

    def _check(
        self, file: StreamFile, keys: list[str] | tuple[str, ...]
    ) -> list[tuple[str | None, str]]:
        try:
            return check_file(
                self.store.filesystem,
                self.store.root,
                file,
                keys,
                self._progress,
                self.store.manifest.checksum,
            )
        except Exception as error:  # every fsspec backend raises its own types
            return [(None, f"cannot be read: {self.store.reason(error)}")]

    def _progress(self, count: int) -> None:
        with self._lock:
            self._on_bytes(count)


def _expected_bytes(store: Store) -> int | None:
    """Bytes of all committed files; None without a valid index."""
    try:
        index = read_index(store)
    except UserError:
        return None
    if index is None:
        return None
    files = store.manifest.weights_files.values()
    return sum(index.bytes_per_stream.values()) + sum(file.bytes for file in files)


def describe_verification(store: Store, found: Verification) -> str:
    """The result as lines of text."""
    if not found.damaged:
        return f"{store.shown_url}: all {found.verified} files equal their commit records"
    lines = [f"{store.shown_url}: DAMAGED ({found.verified} files equal their commit records)"]
    lines += [f"  {damage}" for damage in found.damaged[:MAX_SHOWN]]
    if len(found.damaged) > MAX_SHOWN:
        lines.append(f"  ... and {len(found.damaged) - MAX_SHOWN} more")
    broken = sorted({path for d in found.damaged if (path := _to_delete(store, d)) is not None})
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        lines.append(
            f"to repair it, delete {', '.join(broken[:5])}{more} and run the extraction again"
        )
    return "\n".join(lines)


def _to_delete(store: Store, damage: Damage) -> str | None:
    """The file to delete so that the extraction writes the damaged part again."""
    if damage.shard is not None:
        added = damage.stream if damage.stream in store.added_streams else None
        return commit_path(damage.shard, added)
    return damage.file if damage.file == INDEX or damage.stream is not None else None
