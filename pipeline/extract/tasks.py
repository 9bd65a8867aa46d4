"""An extraction as a list of shards, each a task of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.datasets import ImageItem, Listing
from pipeline.storage.files import absolute_url, redact
from pipeline.targets.cuts import cut_columns
from schemas.extract import ExtractConfig
from schemas.store import (
    STORE_VERSION,
    AutoencoderInfo,
    Column,
    ComputeInfo,
    DatasetInfo,
    LatentsStream,
    Manifest,
    TeacherInfo,
    TeacherStream,
    WeightsFile,
)


class ShardTask(NamedTuple):
    """One shard: a run of consecutive images."""

    shard: int
    items: tuple[ImageItem, ...]


@dataclass(frozen=True)
class Description:
    """What an encoder is; encoders that work on one store must agree in all of it."""

    teacher: TeacherInfo
    autoencoder: AutoencoderInfo | None
    """None where only a teacher stream is added."""
    compute: ComputeInfo


def make_tasks(listing: Listing, shard_size: int) -> list[ShardTask]:
    """Images cut into shards by position."""
    items = listing.items
    return [
        ShardTask(number, tuple(items[start : start + shard_size]))
        for number, start in enumerate(range(0, len(items), shard_size))
    ]


def stream_name(config: ExtractConfig) -> str:
    """The teacher stream that an extraction writes: the first one is called after its cut."""
    return config.add_stream or config.cut


def make_manifest(config: ExtractConfig, listing: Listing, about: Description) -> Manifest:
    """What the store of this extraction will be, but for the teacher's tail."""
    samples = len(listing.items)
    assert about.autoencoder is not None
    latent = Column(shape=about.autoencoder.latent_shape, codec="float16")
    latents = LatentsStream(
        kind="latents",
        columns={"mean": latent, "std": latent, "label": Column(shape=(), codec="int64")},
        compute=about.compute,
    )
    source = None if config.source is None else redact(absolute_url(config.source))
    return Manifest(
        version=STORE_VERSION,
        format=config.format,
        dataset=DatasetInfo(
            name=config.dataset,
            source=source,
            samples=samples,
            num_classes=listing.num_classes,
            fingerprint=listing.fingerprint(),
            order_seed=config.order_seed,
        ),
        resolution=config.resolution,
        autoencoder=about.autoencoder,
        streams={"latents": latents, stream_name(config): make_stream(config, about)},
        shard_size=config.shard_size,
        num_shards=-(-samples // config.shard_size),
    )


def make_stream(config: ExtractConfig, about: Description) -> TeacherStream:
    """The teacher stream of this extraction, but for its tail."""
    columns = cut_columns(
        config.cut,
        about.teacher,
        config.resolution,
        config.codec,
        config.column_codecs,
        compress=config.compress,
    )
    return TeacherStream(
        kind="teacher",
        cut=config.cut,
        columns=columns,
        teacher=about.teacher,
        compute=about.compute,
        added=config.add_stream is not None,
    )


def with_tail(manifest: Manifest, name: str, tail: WeightsFile | None) -> Manifest:
    """The manifest once the weights of a stream's tail lie in the store."""
    stream = manifest.streams[name].model_copy(update={"tail": tail})
    return manifest.model_copy(update={"streams": {**manifest.streams, name: stream}})
