"""An extraction as a list of tasks, one for each shard, and the manifest of its store."""

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
    """One shard: consecutive images of the listing."""

    shard: int
    items: tuple[ImageItem, ...]


@dataclass(frozen=True)
class Description:
    """Models and arithmetic of an encoder; all encoders of one store must have equal ones."""

    teacher: TeacherInfo
    autoencoder: AutoencoderInfo | None
    """None if only a teacher stream is added."""
    compute: ComputeInfo


def make_tasks(listing: Listing, shard_size: int) -> list[ShardTask]:
    """Shards of ``shard_size`` consecutive images; the last may have fewer."""
    items = listing.items
    return [
        ShardTask(number, tuple(items[start : start + shard_size]))
        for number, start in enumerate(range(0, len(items), shard_size))
    ]


def stream_name(config: ExtractConfig) -> str:
    """Name of the teacher stream of an extraction: that of --add-stream, else the cut."""
    return config.add_stream or config.cut


def make_manifest(config: ExtractConfig, listing: Listing, description: Description) -> Manifest:
    """Manifest of this extraction's store, without the teacher's tail."""
    samples = len(listing.items)
    assert description.autoencoder is not None
    latent = Column(shape=description.autoencoder.latent_shape, codec="float16")
    latents = LatentsStream(
        kind="latents",
        columns={"mean": latent, "std": latent, "label": Column(shape=(), codec="int64")},
        compute=description.compute,
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
            class_names=listing.class_names,
            empty_classes=listing.empty_classes,
        ),
        resolution=config.resolution,
        autoencoder=description.autoencoder,
        streams={"latents": latents, stream_name(config): make_stream(config, description)},
        shard_size=config.shard_size,
        num_shards=-(-samples // config.shard_size),
    )


def make_stream(config: ExtractConfig, description: Description) -> TeacherStream:
    """Teacher stream of this extraction, without its tail."""
    columns = cut_columns(
        config.cut,
        description.teacher,
        config.resolution,
        config.codec,
        config.column_codecs,
        compress=config.compress,
    )
    return TeacherStream(
        kind="teacher",
        cut=config.cut,
        columns=columns,
        teacher=description.teacher,
        compute=description.compute,
        added=config.add_stream is not None,
    )


def with_stream(manifest: Manifest, name: str, stream: TeacherStream) -> Manifest:
    """The manifest with the stream ``name``, which it may have already."""
    return manifest.model_copy(update={"streams": {**manifest.streams, name: stream}})


def with_new_stream(manifest: Manifest, name: str, stream: TeacherStream) -> Manifest:
    """The manifest with the stream ``name``, unchanged if it has one of that name."""
    return manifest if name in manifest.streams else with_stream(manifest, name, stream)


def with_tail(manifest: Manifest, name: str, tail: WeightsFile | None) -> Manifest:
    """The manifest with the weights file of a stream's tail."""
    stream = manifest.streams[name].model_copy(update={"tail": tail})
    return manifest.model_copy(update={"streams": {**manifest.streams, name: stream}})
