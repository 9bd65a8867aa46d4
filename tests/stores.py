"""Small stores of random numbers for tests that train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from pipeline.store import ShardWriter, Store
from pipeline.store.captions import describe_null, write_null
from pipeline.store.codecs import encode_column
from schemas.store import STORE_VERSION, Manifest

GRID, HEADS, WIDTH, LAYERS = 4, 3, 12, (1, 2, 3)
LATENT = (4, 8, 8)
TEXT_TOKENS, TEXT_WIDTH = 5, 20


TEACHER = {
    "model": "none",
    "model_args": {},
    "weights": "random",
    "seed": 0,
    "weights_sha256": "1" * 64,
    "image_size": 64,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "depth": 4,
    "width": WIDTH,
    "heads": HEADS,
    "head_width": WIDTH // HEADS,
    "grid": (GRID, GRID),
    "prefix": 1,
    "layers": LAYERS,
}
TEXT_ENCODER = {
    "encoder": "none",
    "weights": "random",
    "seed": 0,
    "model_args": {},
    "weights_sha256": "5" * 64,
    "tokenizer": "none",
    "tokenizer_sha256": "6" * 64,
    "tokens": TEXT_TOKENS,
    "width": TEXT_WIDTH,
}
COMPUTE = {
    "device": "cpu",
    "precision": "float32",
    "batch_size": 4,
    "threads": 1,
    "versions": {},
}


def random_manifest(samples: int, shard_size: int, format: str = "webdataset") -> Manifest:
    """A `maps` store for a student with 4 x 4 tokens (latent 8, patch 2), 5 classes."""
    tokens = GRID * GRID
    return Manifest.model_validate(
        {
            "version": STORE_VERSION,
            "format": format,
            "resolution": 64,
            "shard_size": shard_size,
            "num_shards": -(-samples // shard_size),
            "dataset": {
                "name": "folder",
                "source": None,
                "samples": samples,
                "num_classes": 5,
                "fingerprint": "0" * 64,
                "order_seed": 0,
            },
            "autoencoder": {
                "name": "none",
                "kind": "AutoencoderKL",
                "weights_sha256": "2" * 64,
                "scaling_factor": 0.5,
                "shift_factor": 0.0,
                "latent_shape": LATENT,
            },
            "streams": {
                "latents": {
                    "kind": "latents",
                    "compute": COMPUTE,
                    "columns": {
                        "mean": {"shape": LATENT, "codec": "float16"},
                        "std": {"shape": LATENT, "codec": "float16"},
                        "label": {"shape": (), "codec": "int64"},
                    },
                },
                "maps": {
                    "kind": "teacher",
                    "cut": "maps",
                    "compute": COMPUTE,
                    "teacher": TEACHER,
                    "columns": {
                        "features": {"shape": (tokens, WIDTH), "codec": "float16"},
                        "class_token": {"shape": (WIDTH,), "codec": "float16"},
                        "attention": {
                            "shape": (len(LAYERS), HEADS, tokens, tokens),
                            "codec": "float16",
                        },
                    },
                },
            },
        }
    )


def make_random_store(
    folder: Path, samples: int = 22, shard_size: int = 6, format: str = "webdataset"
) -> Store:
    """Complete, seeded; the last shard is shorter than the others."""
    manifest = random_manifest(samples, shard_size, format)
    store = Store.create(str(folder), manifest)
    rng = np.random.default_rng(0)
    for shard in range(manifest.num_shards):
        first = shard * shard_size
        with ShardWriter(store.url, manifest, shard) as writer:
            for number in range(first, min(first + shard_size, samples)):
                writer.add(f"sample-{number}", _random_sample(rng, number, manifest))
            writer.commit()
    store.finish()
    return store


def add_random_stream(store: Store, name: str, **teacher: object) -> Store:
    """The store with another `maps` stream, complete; ``teacher`` says how its teacher differs."""
    values = store.manifest.model_dump()
    stream = store.manifest.model_dump()["streams"]["maps"]  # not shared with the first
    stream["added"] = True
    stream["teacher"] |= teacher
    tokens = GRID * GRID
    layers = len(stream["teacher"]["layers"])
    stream["columns"]["attention"]["shape"] = (layers, HEADS, tokens, tokens)
    values["streams"][name] = stream
    store = store.update(lambda _: Manifest.model_validate(values))
    rng = np.random.default_rng(1)
    for shard in range(store.manifest.num_shards):
        with ShardWriter(store.url, store.manifest, shard, added=name) as writer:
            for key in store.record(shard).keys:
                writer.add(key, {name: _random_sample(rng, 0, store.manifest, name)["maps"]})
            writer.commit()
    store.finish()
    return store


def add_class_stream(store: Store, name: str = "class", **changes: object) -> Store:
    """The store with random class tokens of its first teacher, complete; ``changes`` replace keys
    of the stream."""
    values = store.manifest.model_dump()
    teacher = next(iter(store.manifest.teacher_streams.values())).teacher
    values["streams"][name] = {
        "kind": "class",
        "columns": {"class_token": {"shape": (teacher.width,), "codec": "float16"}},
        "teacher": teacher.model_dump(exclude={"layers"}),
        "compute": COMPUTE,
        "added": True,
        **changes,
    }
    store = store.update(lambda _: Manifest.model_validate(values))
    rng = np.random.default_rng(2)
    for shard in range(store.manifest.num_shards):
        with ShardWriter(store.url, store.manifest, shard, added=name) as writer:
            for key in store.record(shard).keys:
                writer.add(key, {name: {"class_token": rng.standard_normal(teacher.width)}})
            writer.commit()
    store.finish()
    return store


def add_text_stream(
    store: Store,
    name: str = "text",
    codec: str = "rms32",
    *,
    captions: int = 3,
    shape: tuple[int, int] = (TEXT_TOKENS, TEXT_WIDTH),
    lossless: str = "none",
) -> Store:
    """The store with random embeddings of 1 to ``captions`` captions an image, complete; the null
    caption's are of small numbers."""
    values = store.manifest.model_dump()
    spec = {"shape": shape, "codec": codec, "lossless": lossless}
    columns = {f"caption{n}": spec for n in range(captions)}
    rng = np.random.default_rng(4)
    null = {
        "tokens": torch.zeros(shape[0], dtype=torch.int64),
        "embeddings": torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) / 8,
    }
    data = save(null)
    values["streams"][name] = {
        "kind": "text",
        "keeps": "embeddings",
        "columns": {**columns, "lengths": {"shape": (captions,), "codec": "int64"}},
        "captions": captions,
        "captions_sha256": "4" * 64,
        "encoder": {**TEXT_ENCODER, "tokens": shape[0], "width": shape[1]},
        "null": describe_null(data, name).model_dump(),
        "compute": COMPUTE,
        "added": True,
    }
    store = store.update(lambda _: Manifest.model_validate(values))
    write_null(store, name, data)
    for shard in range(store.manifest.num_shards):
        with ShardWriter(store.url, store.manifest, shard, added=name) as writer:
            for key in store.record(shard).keys:
                count = int(rng.integers(1, captions + 1))
                lengths = np.where(np.arange(captions) < count, 4, 0)
                arrays: dict[str, np.ndarray | int] = {"lengths": lengths}
                for number in range(captions):
                    column = store.manifest.streams[name].columns[f"caption{number}"]
                    drawn = torch.from_numpy(rng.standard_normal((1, *shape)).astype(np.float32))
                    drawn *= float(number < count)
                    encoded = encode_column(f"caption{number}", column, drawn)
                    arrays |= {part: tensor[0].numpy() for part, tensor in encoded.items()}
                writer.add(key, {name: arrays})
            writer.commit()
    store.finish()
    return store


def _random_sample(
    rng: np.random.Generator, number: int, manifest: Manifest, stream: str = "maps"
) -> dict[str, dict[str, np.ndarray | int]]:
    shapes = {name: column.shape for name, column in manifest.streams[stream].columns.items()}
    weights = np.exp(rng.standard_normal(shapes["attention"]))
    return {
        "latents": {
            "mean": rng.standard_normal(LATENT),
            "std": np.abs(rng.standard_normal(LATENT)) * 0.1,
            "label": number % 5,
        },
        "maps": {
            "features": rng.standard_normal(shapes["features"]),
            "class_token": rng.standard_normal(shapes["class_token"]),
            "attention": weights / weights.sum(-1, keepdims=True),
        },
    }


def tiny_run() -> dict[str, object]:
    """A HASTE run of six steps that such a store can train: three aligned, three not."""
    return {
        "name": "tiny",
        "steps": 6,
        "global_batch": 5,
        "ema_decay": 0.9,
        "log_every": 1,
        "student": {
            "model": "SiT-S/2",
            "depth": 4,
            "width": 24,
            "heads": 4,
            "latent_size": 8,
            "num_classes": 5,
        },
        "alignment": {
            "feature_depth": 3,
            "student_layers": [1, 2],
            "teacher_layers": [3, 1],
            "projector_width": 16,
            "termination": {"kind": "fixed", "step": 3},
        },
        "optimizer": {"learning_rate": 1e-2},
        "data": {"window": 2},
    }
