"""An extraction as a list of shards, each a task of its own."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.alignment.cuts import cut_columns
from pipeline.datasets import ImageItem, Listing
from pipeline.files import absolute_url, without_credentials
from schemas.extract import ExtractConfig
from schemas.store import (
    AutoencoderInfo,
    Column,
    ComputeInfo,
    DatasetInfo,
    Manifest,
    Stream,
    TeacherInfo,
    WeightsFile,
)

__all__ = ["ShardTask", "make_manifest", "make_tasks"]


class ShardTask(NamedTuple):
    """One shard: a run of consecutive images."""

    shard: int
    items: tuple[ImageItem, ...]


def make_tasks(listing: Listing, shard_size: int) -> list[ShardTask]:
    """Images cut into shards by position."""
    items = listing.items
    return [
        ShardTask(number, tuple(items[start : start + shard_size]))
        for number, start in enumerate(range(0, len(items), shard_size))
    ]


def make_manifest(
    config: ExtractConfig,
    listing: Listing,
    teacher: TeacherInfo,
    autoencoder: AutoencoderInfo,
    compute: ComputeInfo,
    tail: WeightsFile | None = None,
) -> Manifest:
    """What the store of this extraction will be."""
    samples = len(listing.items)
    latent = Column(shape=autoencoder.latent_shape, codec="float16")
    streams = {
        "latents": Stream(
            kind="latents",
            columns={"mean": latent, "std": latent, "label": Column(shape=(), codec="int64")},
        ),
        config.cut: Stream(
            kind="teacher",
            columns=cut_columns(config.cut, teacher, config.resolution, config.codec),
        ),
    }
    source = None if config.source is None else without_credentials(absolute_url(config.source))
    return Manifest(
        format=config.format,
        cut=config.cut,
        dataset=DatasetInfo(
            name=config.dataset,
            source=source,
            samples=samples,
            num_classes=listing.num_classes,
            fingerprint=listing.fingerprint(),
            order_seed=config.order_seed,
        ),
        resolution=config.resolution,
        teacher=teacher,
        autoencoder=autoencoder,
        compute=compute,
        streams=streams,
        tail=tail,
        shard_size=config.shard_size,
        num_shards=-(-samples // config.shard_size),
    )
