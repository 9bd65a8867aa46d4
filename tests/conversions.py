"""Small extractions, and conversions of them, for the tests of `pipeline.convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.alignment.losses import Targets
from pipeline.cli.config_files import merge
from pipeline.convert import Conversion, convert
from pipeline.datasets import Listing, list_images
from pipeline.extract.encoder import Encoder
from pipeline.extract.tasks import make_manifest, make_stream, make_tasks, with_tail
from pipeline.store import Store, StreamReader
from pipeline.targets.sources import Wanted, read_targets
from schemas.convert import ConvertConfig
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig

SAMPLES, SHARD, BATCH = 11, 4, 3
WANTED = Wanted(features=True, layers=(5, 3), heads=6)

Extract = Callable[..., Store]


def options(folder: Path, **given: Any) -> ExtractConfig:
    values = {"dataset": "demo", "store": str(folder), "shard_size": SHARD, "batch_size": BATCH}
    return ExtractConfig.model_validate(merge({**PRESETS["demo"], **values}, given))


def digits(config: ExtractConfig) -> Listing:
    everything = list_images(config)
    return Listing(everything.items[:SAMPLES], everything.num_classes)


def encode(config: ExtractConfig) -> Store:
    encoder = Encoder(config, device="cpu", threads=1)
    assert config.store is not None
    listing = digits(config)
    tail = encoder.save_tail(config.store)
    manifest = with_tail(make_manifest(config, listing, encoder.describe()), config.cut, tail)
    store = Store.create(config.store, manifest)
    for task in make_tasks(listing, config.shard_size):
        encoder.encode_shard(store.url, manifest, task)
    store.finish()
    return store


def with_added_stream(store: Store, **given: Any) -> None:
    config = options(Path(store.root), **given)
    encoder = Encoder(config, device="cpu", threads=1)
    name = str(config.add_stream)
    stream = make_stream(config, encoder.describe())
    manifest = store.manifest.model_copy(
        update={"streams": {**store.manifest.streams, name: stream}}
    )
    tail = encoder.save_tail(store.url)
    grown = store.update(lambda _: with_tail(manifest, name, tail))
    for task in make_tasks(digits(config), SHARD):
        encoder.encode_shard(grown.url, grown.manifest, task)
    grown.finish()


def converted(source: Store, folder: Path, **given: Any) -> Store:
    return run(source, folder, **given).store


def run(source: Store, folder: Path, **given: Any) -> Conversion:
    config = {"source": source.url, "target": str(folder), "device": "cpu", **given}
    return convert(ConvertConfig.model_validate(config))


def targets_of(store: Store, wanted: Wanted = WANTED) -> Targets:
    torch.set_num_threads(1)
    numbers = np.arange(SAMPLES)
    return read_targets(store, numbers // SHARD, numbers % SHARD, wanted)


def assert_close(one: Targets, other: Targets, rtol: float, atol: float) -> None:
    torch.testing.assert_close(one.features, other.features, rtol=rtol, atol=atol)
    torch.testing.assert_close(one.attention, other.attention, rtol=rtol, atol=atol)


def arrays_of(store: Store, stream: str) -> dict[str, np.ndarray]:
    reader = StreamReader(store, stream)
    numbers = np.arange(SAMPLES)
    return reader.read(numbers // SHARD, numbers % SHARD)


def assert_same_arrays(one: Store, other: Store, stream: str, to: str | None = None) -> None:
    a, b = arrays_of(one, stream), arrays_of(other, to or stream)
    assert a.keys() == b.keys()
    for part in a:
        assert a[part].tobytes() == b[part].tobytes(), part


def divergence(exact: Targets, other: Targets) -> torch.Tensor:
    """Mean KL of attention rows in nats."""
    floor = torch.finfo(torch.float32).tiny
    p, q = (t.attention.double().clamp_min(floor) for t in (exact, other))
    return (p * (p / q).log()).sum(-1).mean()


def refusal(source: Store, folder: Path, **given: Any) -> str:
    """The error message of a refused conversion: one line."""
    with pytest.raises(UserError) as error:
        run(source, folder, **given)
    assert "\n" not in str(error.value)
    return str(error.value)
