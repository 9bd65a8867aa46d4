"""Consistency of a store's manifest, commit records and index."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.inspect.file_check import Damage
from pipeline.store import Store
from pipeline.store.arrays import stream_parts
from pipeline.store.layout import INDEX, chunk_path, commit_path, tar_path
from schemas.errors import UserError
from schemas.store import CommitRecord, StoreIndex


def record_problems(store: Store, record: CommitRecord) -> list[tuple[str | None, str]]:
    """(stream, problem) for each contradiction between a valid record and the manifest."""
    manifest, shard = store.manifest, record.shard
    planned = min(manifest.shard_size, manifest.dataset.samples - shard * manifest.shard_size)
    found: list[tuple[str | None, str]] = []
    if record.samples > planned:
        found.append((None, f"lists {record.samples} samples of a shard of {planned}"))
    if len(set(record.keys)) < len(record.keys):
        found.append((None, "lists a sample twice"))
    for name, files in record.streams.items():
        parts = stream_parts(manifest.streams[name].columns)
        if manifest.format == "zarr":
            held = parts.items() if record.samples else ()
            expected = {chunk_path(name, p, shard, len(part.shape)): {p} for p, part in held}
        else:
            expected = {tar_path(name, shard): set(parts)}
        listed = {file.file: set(file.offsets) for file in files}
        if len(listed) < len(files) or listed != expected:
            found.append((name, "lists other files or columns than the manifest"))
    return found


def check_index(
    store: Store,
    committed: Mapping[str, set[int]],
    samples: Mapping[int, int],
    sizes: Mapping[str, int],
    all_read: bool,
) -> list[Damage]:
    """Differences between the index and the commit records: ``committed``
    shards by stream, ``samples`` by shard and bytes by stream (``sizes``); the bytes are compared
    only if all records could be read (``all_read``)."""
    try:
        index = read_index(store)
    except UserError as error:
        return [Damage(str(error).removeprefix(f"{store.shown_url}/{INDEX} "), INDEX)]
    if index is None:
        return []
    found = []
    for stream, shards in committed.items():
        added = None if stream == "latents" else stream
        if added is None or added in index.bytes_per_stream:  # else the stream is still being added
            found += [
                Damage("is missing, though the index counts it", commit_path(n, added), added, n)
                for n in range(store.manifest.num_shards)
                if n not in shards
            ]
    for shard, count in sorted(samples.items()):
        listed = index.samples_per_shard[shard]
        if listed != count:
            problem = f"counts {listed} samples of shard {shard}, its record {count}"
            found.append(Damage(problem, INDEX))
    if all_read and not found:
        for stream, size in sizes.items():
            listed = index.bytes_per_stream.get(stream, size)
            if listed != size:
                problem = f"counts {listed} bytes of stream '{stream}', its records {size}"
                found.append(Damage(problem, INDEX))
    return found


def read_index(store: Store) -> StoreIndex | None:
    """The index; None if the store is incomplete. Raises ``UserError`` if the index is damaged."""
    return store.index() if store.has_index() else None
