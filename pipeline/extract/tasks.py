"""An extraction as a list of tasks, one for each shard, and the manifest of its store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.datasets import ImageItem, Listing
from pipeline.storage.files import absolute_url, redact
from pipeline.targets.cuts import class_columns, cut_columns
from schemas.cuts import TeacherShape
from schemas.extract import ExtractConfig
from schemas.fields import class_stream_name
from schemas.store import (
    STORE_VERSION,
    AutoencoderInfo,
    ClassStream,
    ClassToken,
    Column,
    ComputeInfo,
    DatasetInfo,
    LatentsStream,
    Manifest,
    Stream,
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
    class_token: ClassToken | None = None
    """Vector of the class stream; None where none is written."""


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


def class_name(config: ExtractConfig) -> str:
    """Name of the class stream that belongs to that teacher stream."""
    return class_stream_name(stream_name(config), added=config.add_stream is not None)


def extracted_class_stream(config: ExtractConfig, manifest: Manifest) -> ClassStream | None:
    """The class stream that this extraction writes beside its teacher stream. One that was computed
    from the store later is written by that command alone."""
    stream = manifest.class_streams.get(class_name(config))
    if stream is None or stream.converted_from or stream.added != (config.add_stream is not None):
        return None
    return stream


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
        streams={"latents": latents, **make_streams(config, description)},
        shard_size=config.shard_size,
        num_shards=-(-samples // config.shard_size),
    )


def make_streams(config: ExtractConfig, description: Description) -> dict[str, Stream]:
    """Teacher stream of this extraction, without its tail, and its class stream."""
    streams: dict[str, Stream] = {stream_name(config): make_stream(config, description)}
    if description.class_token is not None:
        streams[class_name(config)] = ClassStream(
            kind="class",
            columns=class_columns_of(config, description.teacher.width),
            token=description.class_token,
            teacher=description.teacher.model_copy(update={"layers": ()}),
            compute=description.compute,
            added=config.add_stream is not None,
        )
    return streams


def cut_columns_of(
    config: ExtractConfig, teacher: TeacherShape, *, with_class_stream: bool
) -> dict[str, Column]:
    """Columns of the teacher stream. ``column_codecs.class_token`` is also that of the class
    stream, whose cut need not have such a column. Raises ``UserError``."""
    codecs = dict(config.column_codecs)
    if with_class_stream and config.cut in {"activations", "image"}:
        codecs.pop("class_token", None)
    return cut_columns(
        config.cut,
        teacher,
        config.resolution,
        config.codec,
        codecs,
        compress=config.compress,
    )


def class_columns_of(config: ExtractConfig, width: int) -> dict[str, Column]:
    return class_columns(width, config.codec, config.column_codecs, compress=config.compress)


def make_stream(config: ExtractConfig, description: Description) -> TeacherStream:
    """Teacher stream of this extraction, without its tail."""
    has_class = description.class_token is not None
    return TeacherStream(
        kind="teacher",
        cut=config.cut,
        columns=cut_columns_of(config, description.teacher, with_class_stream=has_class),
        teacher=description.teacher,
        compute=description.compute,
        added=config.add_stream is not None,
    )


def with_streams(manifest: Manifest, streams: Mapping[str, Stream]) -> Manifest:
    """The manifest with these streams, which it may have already."""
    return manifest.model_copy(update={"streams": {**manifest.streams, **streams}})


def with_new_streams(manifest: Manifest, streams: Mapping[str, Stream]) -> Manifest:
    """The manifest with these streams, unchanged if it has the first of them."""
    known = next(iter(streams)) in manifest.streams
    return manifest if known else with_streams(manifest, streams)


def with_tail(manifest: Manifest, name: str, tail: WeightsFile | None) -> Manifest:
    """The manifest with the weights file of a stream's tail."""
    stream = manifest.streams[name].model_copy(update={"tail": tail})
    return manifest.model_copy(update={"streams": {**manifest.streams, name: stream}})
