"""Paths below the root of a store, and rows of its zarr arrays."""

from collections.abc import Sequence

from schemas.fields import COMMITS

MANIFEST = "manifest.json"
INDEX = "index.json"


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}"


def commit_folder(added: str | None) -> str:
    """Folder of the commit records of the base streams, or of an ``added`` stream."""
    return COMMITS if added is None else f"{COMMITS}/{added}"


def commit_path(shard: int, added: str | None = None) -> str:
    return f"{commit_folder(added)}/{shard_name(shard)}.json"


def tar_path(stream: str, shard: int) -> str:
    return f"{stream}/{shard_name(shard)}.tar"


def chunk_path(stream: str, part: str, shard: int, dimensions: int) -> str:
    """The zarr v3 key of a shard of an array whose samples have ``dimensions`` dimensions."""
    return f"{stream}/{part}/c/{shard}" + "/0" * dimensions


def array_rows(samples_per_shard: Sequence[int], shard_size: int) -> int:
    """Rows of the zarr arrays of a complete store, which end with its last sample."""
    ends = (n * shard_size + samples for n, samples in enumerate(samples_per_shard) if samples)
    return max(ends, default=0)
