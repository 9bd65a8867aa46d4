"""Small real stores, made without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.cli.config_files import merge
from pipeline.datasets import Listing, list_images
from pipeline.extract.encoder import Encoder, ShardResult
from pipeline.extract.tasks import ShardTask, make_manifest, make_tasks, with_tail
from pipeline.store import Store
from schemas.extract import PRESETS, ExtractConfig
from schemas.store import Manifest

SAMPLES = 8


class LocalPool:
    """The encoder pool of an extraction, in this process; the fixture ``without_ray`` sets it."""

    def __init__(self, config: ExtractConfig, **_: Any) -> None:
        self.encoder = Encoder(config, device="cpu", threads=1)
        self.describe, self.save_tail = self.encoder.describe, self.encoder.save_tail
        self.describe_tail, self.calibrate = self.encoder.describe_tail, self.encoder.calibrate

    def encode(
        self, url: str, manifest: Manifest, tasks: Iterable[ShardTask]
    ) -> Iterator[ShardResult]:
        return (self.encoder.encode_shard(url, manifest, task) for task in tasks)

    def close(self) -> None: ...


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
