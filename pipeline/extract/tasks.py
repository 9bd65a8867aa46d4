"""An extraction as a list of tasks, one for each shard, and the manifest of its store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pipeline.datasets import ImageItem, Listing
from pipeline.storage.files import absolute_url, exists, redact
from pipeline.store import Store
from pipeline.store.manifest_diff import check_same_store
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


class Describes(Protocol):
    """An encoder, or a pool of equal ones."""

    def describe(self) -> Description: ...
    def save_tail(self, url: str) -> WeightsFile | None: ...


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


def with_tail(manifest: Manifest, name: str, tail: WeightsFile | None) -> Manifest:
    """The manifest with the weights file of a stream's tail."""
    stream = manifest.streams[name].model_copy(update={"tail": tail})
    return manifest.model_copy(update={"streams": {**manifest.streams, name: stream}})


def open_store(
    config: ExtractConfig,
    listing: Listing,
    existing: Store | None,
    encoder: Describes,
) -> Store:
    """The store with its manifest and the teacher's tail, ready for shards. Raises ``UserError``
    where ``existing`` was made with other options or weights."""
    description = encoder.describe()
    name = stream_name(config)
    if existing is None:
        assert config.store is not None
        manifest = make_manifest(config, listing, description)
        tail = encoder.save_tail(config.store)
        return Store.create(config.store, with_tail(manifest, name, tail))
    manifest = existing.manifest
    if config.add_stream is None:
        check_same_store(manifest, make_manifest(config, listing, description), existing.shown_url)
    else:
        stream = make_stream(config, description)
        expected = manifest.model_copy(update={"streams": {**manifest.streams, name: stream}})
        if name not in manifest.streams:
            tail = encoder.save_tail(existing.url)
            return Store.create(existing.url, with_tail(expected, name, tail))
        check_same_store(manifest, expected, existing.shown_url)
    if lacks_tail(existing, name):
        encoder.save_tail(existing.url)
    return existing


def missing_tasks(config: ExtractConfig, listing: Listing, store: Store) -> list[ShardTask]:
    """Tasks of the shards that the stream lacks; an added stream has the samples of the store."""
    missing = set(store.missing_shards(stream_name(config)))
    tasks = [task for task in make_tasks(listing, config.shard_size) if task.shard in missing]
    if config.add_stream is None:
        return tasks
    stored = []
    for task in tasks:
        keys = set(store.record(task.shard).keys)
        stored.append(ShardTask(task.shard, tuple(i for i in task.items if i.key in keys)))
    return stored


def lacks_tail(store: Store, name: str) -> bool:
    """True if the manifest names the tail of a stream whose file does not exist."""
    stream = store.manifest.streams[name]
    tail = stream.tail if isinstance(stream, TeacherStream) else None
    return tail is not None and not exists(store.filesystem, f"{store.root}/{tail.file}")
