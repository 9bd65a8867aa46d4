"""Small real stores, made without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.cli.config_files import merge
from pipeline.datasets import Listing, list_images
from pipeline.extract.encoder import Encoder
from pipeline.extract.tasks import make_manifest, make_tasks, with_tail
from pipeline.store import Store
from schemas.extract import PRESETS, ExtractConfig

SAMPLES = 8


def encode(folder: Path, samples: int = SAMPLES, device: str = "cpu", **options: Any) -> Store:
    """The first digits through the demo's networks, one shard and one batch."""
    values = {"dataset": "demo", "store": str(folder), "shard_size": SAMPLES, "batch_size": SAMPLES}
    config = ExtractConfig.model_validate(merge({**PRESETS["demo"], **values}, options))
    encoder = Encoder(config, device=device, threads=1)
    info = encoder.describe()
    everything = list_images(config)
    listing = Listing(everything.items[:samples], everything.num_classes)
    manifest = with_tail(
        make_manifest(config, listing, info), config.cut, encoder.save_tail(str(folder))
    )
    store = Store.create(str(folder), manifest)
    for task in make_tasks(listing, SAMPLES):
        encoder.encode_shard(store.url, manifest, task)
    store.finish()
    return store


def demo_like(source: Path, store: Path | str, **overrides: object) -> ExtractConfig:
    """The demo's small networks on a folder of pictures."""
    values = {
        "dataset": "folder",
        "source": str(source),
        "store": str(store),
        "shard_size": 3,
        "batch_size": 2,
    }
    return ExtractConfig.model_validate(merge({**PRESETS["demo"], **values}, overrides))
