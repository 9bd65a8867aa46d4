"""An extraction as a list of tasks, one for each shard, and the manifest of its store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.datasets import COCO, ImageItem, Listing
from pipeline.extract.captions import make_text_stream
from pipeline.randomness import Purpose, generator
from pipeline.storage.files import absolute_url, redact
from pipeline.targets.cuts import class_columns, cut_columns, stepped_columns, with_steps
from schemas.calibration import Calibration
from schemas.codecs import CodecName
from schemas.cuts import TeacherShape
from schemas.extract import ExtractConfig
from schemas.fields import TEXT, class_stream_name
from schemas.networks import AutoencoderInfo, TeacherInfo, TextEncoderInfo, WeightsFile
from schemas.store import STORE_VERSION, DatasetInfo, Manifest
from schemas.streams import (
    ClassStream,
    ClassToken,
    Column,
    ComputeInfo,
    LatentsStream,
    Stream,
    TeacherStream,
    TextStream,
)


class ShardTask(NamedTuple):
    """One shard: consecutive images of the listing."""

    shard: int
    items: tuple[ImageItem, ...]


@dataclass(frozen=True)
class TextDescription:
    """A text encoder, its null caption and its arithmetic."""

    info: TextEncoderInfo
    null: WeightsFile
    compute: ComputeInfo


@dataclass(frozen=True)
class Description:
    """Models and arithmetic of an encoder; all encoders of one store must have equal ones."""

    teacher: TeacherInfo | None
    """None if only captions are added."""
    autoencoder: AutoencoderInfo | None
    """None if only a stream is added."""
    compute: ComputeInfo
    class_token: ClassToken | None = None
    """Vector of the class stream; None where none is written."""
    text: TextDescription | None = None
    """None if no captions are stored."""
    calibration: Calibration | None = None
    """Measurement that chose the steps of the codecs; None for fixed steps."""


def make_tasks(listing: Listing, shard_size: int) -> list[ShardTask]:
    """Shards of ``shard_size`` consecutive images; the last may have fewer."""
    items = listing.items
    return [
        ShardTask(number, tuple(items[start : start + shard_size]))
        for number, start in enumerate(range(0, len(items), shard_size))
    ]


def stream_name(config: ExtractConfig) -> str:
    """Name of the teacher stream of an extraction: that of --add-stream, else the cut; of
    captions where only these are added."""
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
    # COCO's log variances go down to -30: a std of 3e-7, of which float16 keeps two bits
    codec: CodecName = "float32" if config.dataset == "coco256_features" else "float16"
    latent = Column(shape=description.autoencoder.latent_shape, codec=codec)
    latents = LatentsStream(
        kind="latents",
        columns={"mean": latent, "std": latent, "label": Column(shape=(), codec="int64")},
        compute=description.compute,
    )
    source = None if config.source is None else redact(absolute_url(config.source))
    streams: dict[str, Stream] = {"latents": latents, **make_streams(config, description)}
    if description.text is not None:
        streams[TEXT] = make_captions(config, listing, description)
    file = config.captions if config.dataset != "folder" else absolute_url(config.captions or "")
    return Manifest(
        version=STORE_VERSION,
        format=config.format,
        checksum="crc32c",
        dataset=DatasetInfo(
            name=config.dataset,
            source=source,
            samples=samples,
            num_classes=listing.num_classes,
            fingerprint=listing.fingerprint(),
            order_seed=config.order_seed,
            class_names=listing.class_names,
            empty_classes=listing.empty_classes,
            split=(config.split or "train") if config.dataset in COCO else None,
            dummy_class=is_unlabelled(config, listing),
            captions=listing.captions,
            captions_from=None if config.captions is None else redact(file or ""),
        ),
        resolution=config.resolution,
        crop=config.crop,
        autoencoder=description.autoencoder,
        streams=streams,
        shard_size=config.shard_size,
        num_shards=-(-samples // config.shard_size),
    )


def is_unlabelled(config: ExtractConfig, listing: Listing) -> bool:
    """True where images have captions and no classes."""
    single = listing.num_classes == 1 and not listing.class_names
    return listing.captions is not None and single


def make_captions(config: ExtractConfig, listing: Listing, description: Description) -> TextStream:
    """The stream of captions of this extraction."""
    assert description.text is not None
    text = description.text
    return make_text_stream(config, listing, text.info, text.null, text.compute)


def make_streams(config: ExtractConfig, description: Description) -> dict[str, Stream]:
    """Teacher stream of this extraction, without its tail, and its class stream."""
    assert description.teacher is not None
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
    config: ExtractConfig,
    teacher: TeacherShape,
    *,
    with_class_stream: bool,
    calibration: Calibration | None = None,
) -> dict[str, Column]:
    """Columns of the teacher stream, with the steps of a calibration. ``column_codecs.class_token``
    is also that of the class stream, whose cut need not have such a column. Raises
    ``UserError``."""
    codecs = dict(config.column_codecs)
    if with_class_stream and config.cut in {"activations", "image"}:
        codecs.pop("class_token", None)
    columns = cut_columns(
        config.cut,
        teacher,
        config.resolution,
        config.codec.name,
        codecs,
        compress=config.compress,
    )
    return columns if calibration is None else with_steps(columns, calibration.curves)


def calibrated_columns(config: ExtractConfig, columns: Iterable[str]) -> list[str]:
    """Columns whose steps a calibration of this extraction chooses; empty without one."""
    if config.codec.promise is None:
        return []
    return stepped_columns(columns, config.column_codecs)


def calibration_items(config: ExtractConfig, listing: Listing) -> tuple[ImageItem, ...]:
    """Images of a calibration, in a seeded order, and as many again, which take the places of
    those that cannot be read."""
    items = listing.items
    order = generator(Purpose.CALIBRATION, config.codec.seed).permutation(len(items))
    count = 2 * config.codec.images(len(items))
    return tuple(items[number] for number in order[:count].tolist())


def class_columns_of(config: ExtractConfig, width: int) -> dict[str, Column]:
    return class_columns(width, config.codec.name, config.column_codecs, compress=config.compress)


def make_stream(config: ExtractConfig, description: Description) -> TeacherStream:
    """Teacher stream of this extraction, without its tail."""
    assert description.teacher is not None
    columns = cut_columns_of(
        config,
        description.teacher,
        with_class_stream=description.class_token is not None,
        calibration=description.calibration,
    )
    return TeacherStream(
        kind="teacher",
        cut=config.cut,
        columns=columns,
        teacher=description.teacher,
        compute=description.compute,
        added=config.add_stream is not None,
        calibration=description.calibration,
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
