"""Stores of random numbers that compress like real ones, for benchmarks of storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.precision import choose_precision
from pipeline.store import ShardWriter, Store
from pipeline.store.writer import Values
from pipeline.targets.cuts import cut_columns, encode_values
from schemas.codecs import CodecSet
from schemas.extract import Cut, Format
from schemas.networks import TeacherInfo, WeightsFile
from schemas.store import Manifest
from schemas.streams import Column
from tests.stores import COMPUTE, TEACHER, random_manifest

DISTINCT = 16  # samples; the others repeat them
LATENT = (4, 32, 32)


class StoreSpec(NamedTuple):
    """Contents and size of a store."""

    name: str
    cut: Cut
    codec: CodecSet
    compress: bool
    shards: int
    shard_size: int


STORE_SPECS = {
    spec.name: spec
    for spec in (
        StoreSpec("activations faithful", "activations", "faithful", True, 12, 64),
        StoreSpec("activations int8 uncompressed", "activations", "int8", False, 12, 64),
        StoreSpec("maps float16", "maps", "float16", False, 6, 8),
    )
}
TINY = StoreSpec("tiny", "activations", "faithful", True, 3, 4)
"""Store of the smoke test."""


def dinov2_b(layers: Sequence[int] = (8, 9, 10, 11)) -> TeacherInfo:
    """Description of a teacher of DINOv2-B's shape; no such model is created."""
    values = {
        **TEACHER,
        "width": 768,
        "heads": 12,
        "head_width": 64,
        "grid": (16, 16),
        "layers": tuple(layers),
        "depth": 12,
    }
    return TeacherInfo.model_validate(values)


def make_manifest(
    spec: StoreSpec,
    format: Format,
    teacher: TeacherInfo,
    tail: WeightsFile | None = None,
    device: str = "cpu",
) -> Manifest:
    """Manifest of a store of 256-pixel images, extracted on ``device``."""
    compute = {**COMPUTE, "device": device, "precision": choose_precision("auto", device)}
    columns = cut_columns(spec.cut, teacher, 256, spec.codec, compress=spec.compress)
    latent = Column(shape=LATENT, codec="float16")
    base = random_manifest(spec.shards * spec.shard_size, spec.shard_size, format)
    values: dict[str, Any] = base.model_dump()
    values["autoencoder"]["latent_shape"] = LATENT
    values["checksum"] = "crc32c"
    values["streams"] = {
        "latents": {
            "kind": "latents",
            "compute": compute,
            "columns": {"mean": latent, "std": latent, "label": Column(shape=(), codec="int64")},
        },
        spec.cut: {
            "kind": "teacher",
            "cut": spec.cut,
            "compute": compute,
            "teacher": teacher,
            "columns": columns,
            "tail": tail,
        },
    }
    return Manifest.model_validate(values)


def make_samples(manifest: Manifest) -> list[Values]:
    """``DISTINCT`` seeded samples, encoded."""
    rng = torch.Generator().manual_seed(0)
    name, stream = manifest.teacher_stream()
    samples: list[Values] = []
    for number in range(DISTINCT):
        values = {n: _tensor(n, column.shape, rng) for n, column in stream.columns.items()}
        arrays = encode_values(stream.columns, values)
        latents = {part: torch.randn(LATENT, generator=rng).half() for part in ("mean", "std")}
        samples.append(
            {
                name: {part: tensor[0].numpy() for part, tensor in arrays.items()},
                "latents": {**{n: t.numpy() for n, t in latents.items()}, "label": number},
            }
        )
    return samples


def write_store(url: str, manifest: Manifest, samples: list[Values]) -> Store:
    """Write a complete store at ``url``."""
    store = Store.create(url, manifest)
    size = manifest.shard_size
    for shard in range(manifest.num_shards):
        with ShardWriter(store.url, manifest, shard) as writer:
            for number in range(shard * size, (shard + 1) * size):
                writer.add(f"class/{number:06d}", samples[number % len(samples)])
            writer.commit()
    store.finish()
    return store


def _tensor(name: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """One sample (1, *shape): tokens with a common mean, or rows of attention."""
    x = torch.randn(1, *shape, generator=rng)
    if name == "attention":
        return torch.softmax(x, -1)
    return x + torch.randn(shape[-1:], generator=rng) if name == "tokens" else x


def all_rows(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Shard and row of every sample in order."""
    positions = np.arange(manifest.num_shards * manifest.shard_size)
    return positions // manifest.shard_size, positions % manifest.shard_size
