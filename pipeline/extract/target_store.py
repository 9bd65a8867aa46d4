"""The store that an extraction writes to: its manifest, the teacher's tail, missing shards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from pipeline.datasets import ImageItem, Listing
from pipeline.extract.captions import adds_captions, keeps_captions, text_stream_name
from pipeline.extract.compatibility import check_request
from pipeline.extract.tasks import (
    Description,
    ShardTask,
    calibrated_columns,
    calibration_items,
    class_name,
    cut_columns_of,
    extracted_class_stream,
    make_captions,
    make_manifest,
    make_streams,
    make_tasks,
    stream_name,
    with_new_streams,
    with_streams,
    with_tail,
)
from pipeline.storage.files import exists
from pipeline.store import Store
from pipeline.store.captions import write_null
from pipeline.store.manifest_diff import check_same_store
from schemas.calibration import Calibration
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.networks import WeightsFile
from schemas.streams import Stream, TeacherStream

logger = logging.getLogger(__name__)


class Encodes(Protocol):
    """An encoder, or a pool of equal ones."""

    def describe(self) -> Description: ...
    def describe_tail(self) -> WeightsFile | None: ...
    def save_tail(self, url: str) -> WeightsFile | None: ...
    def null_caption(self) -> bytes | None: ...
    def calibrate(
        self, items: Sequence[ImageItem], images: int, latent_shape: tuple[int, int, int]
    ) -> Calibration: ...


def open_store(
    config: ExtractConfig, listing: Listing, existing: Store | None, encoder: Encodes
) -> Store:
    """The store with its manifest and the teacher's tail, ready for shards. The manifest comes
    first, and is compared even if it is new: of two commands that start at once, one writes it."""
    description = encoder.describe()
    name = stream_name(config)
    is_new = existing is None or name not in existing.manifest.streams  # a file there is of others
    if (
        existing is not None
        and not is_new
        and not extracted_class_stream(config, existing.manifest)
    ):
        description = replace(description, class_token=None)  # begun without: an earlier version
    calibration = choose_steps(config, listing, existing, description, encoder)
    description = replace(description, calibration=calibration)
    if config.add_stream is None:
        wanted = make_manifest(config, listing, description)
        if existing is None:
            assert config.store is not None
            tail = encoder.describe_tail()
            existing = Store.create(config.store, with_tail(wanted, name, tail))
            check_request(config, listing, existing)
            wanted = make_manifest(config, listing, with_steps_of(existing, name, description))
    else:
        assert existing is not None
        streams: dict[str, Stream]
        if adds_captions(config):
            streams = {name: make_captions(config, listing, description)}
        else:
            streams = make_streams(config, description)
        if name not in existing.manifest.streams:
            added = dict(streams)
            if not adds_captions(config):
                tail = encoder.describe_tail()
                added[name] = streams[name].model_copy(update={"tail": tail})
            existing = existing.update(lambda now: with_new_streams(now, added))
            check_request(config, listing, existing)
            if not adds_captions(config):
                streams = make_streams(config, with_steps_of(existing, name, description))
        wanted = with_streams(existing.manifest, streams)
    check_same_store(existing.manifest, wanted, existing.shown_url)
    save_null(config, existing, encoder, is_new=is_new)
    writes_tail = is_new or lacks_tail(existing, name)
    if writes_tail and encoder.save_tail(existing.url) != _tail(existing, name):
        raise UserError(
            f"store '{existing.shown_url}' was made with another tail of the teacher of stream "
            f"'{name}', and has lost it: use another --store"
        )
    return existing


def choose_steps(
    config: ExtractConfig,
    listing: Listing,
    store: Store | None,
    description: Description,
    encoder: Encodes,
) -> Calibration | None:
    """The calibration of the stream: that of the manifest if the stream exists, also where it has
    none, or if another stream holds the same tensors; else a new one. Raises ``UserError``."""
    teacher, name = description.teacher, stream_name(config)
    streams = {} if store is None else store.manifest.teacher_streams
    if name in streams:
        return streams[name].calibration
    if teacher is None:
        return None
    has_class = description.class_token is not None
    columns = calibrated_columns(
        config, cut_columns_of(config, teacher, with_class_stream=has_class)
    )
    if not columns:
        return None
    for other, stream in streams.items():
        known = stream.calibration
        same = stream.cut == config.cut and stream.teacher == teacher
        same &= stream.compute.precision == description.compute.precision
        same &= known is not None and known.promise == config.codec.promise
        if known is not None and same and known.columns == set(columns):
            logger.info("stream '%s' has the codec steps of stream '%s'", name, other)
            return known
    autoencoder = description.autoencoder
    if autoencoder is None:
        assert store is not None
        autoencoder = store.manifest.autoencoder
    images = config.codec.images(len(listing.items))
    logger.info("choosing the steps of codec '%s' on %d images", config.codec.name, images)
    items = calibration_items(config, listing)
    found = encoder.calibrate(items, images, autoencoder.latent_shape)
    logger.info("%s", describe_calibration(found))
    return found


def with_steps_of(store: Store, name: str, description: Description) -> Description:
    """With the codec steps that the manifest names: another command may have written it first."""
    return replace(description, calibration=store.manifest.teacher_streams[name].calibration)


def describe_calibration(found: Calibration) -> str:
    """Chosen codecs and their errors in one line."""
    chosen = []
    for curve in found.curves:
        place = "" if curve.layer is None else f" of layer {curve.layer}"
        chosen.append(f"{curve.codec} for {' and '.join(curve.columns)}{place}")
    kl = "" if found.errors.kl is None else f"KL {found.errors.kl:.2e}, "
    line = (
        f"codec '{found.codec}': {', '.join(chosen)}: {kl}"
        f"feature cosine {found.errors.feature_cosine:.6f}, gradient cosine "
        f"{found.errors.gradient_cosine:.6f} over {len(found.keys)} images"
    )
    if found.arithmetic is not None and not found.arithmetic.keep(found.promise):
        line += (
            "; the arithmetic alone has errors above the promise "
            f"(KL {found.arithmetic.kl or 0:.2e}, feature cosine "
            f"{found.arithmetic.feature_cosine:.6f}): see --precision float32"
        )
    return line


def save_null(
    config: ExtractConfig, store: Store, encoder: Encodes, *, is_new: bool = False
) -> None:
    """Write the null caption of the extraction's stream, if the store lacks it. Raises
    ``UserError``."""
    name = text_stream_name(config)
    if keeps_captions(config) and (is_new or name in lost_nulls(store)):
        null = encoder.null_caption()
        assert null is not None
        write_null(store, name, null)


def lost_nulls(store: Store) -> set[str]:
    """Streams of captions whose null caption has no file."""
    streams = store.manifest.text_streams.items()
    files = {name: f"{store.root}/{stream.null.file}" for name, stream in streams}
    return {name for name, path in files.items() if not exists(store.filesystem, path)}


def missing_shards(config: ExtractConfig, store: Store) -> set[int]:
    """Shards that the extraction's teacher stream or its class stream lacks."""
    missing = set(store.missing_shards(stream_name(config)))
    if extracted_class_stream(config, store.manifest) is not None:
        missing |= set(store.missing_shards(class_name(config)))
    return missing


def missing_tasks(config: ExtractConfig, listing: Listing, store: Store) -> list[ShardTask]:
    """Tasks of the shards that the stream lacks; an added stream has the samples of the store."""
    missing = missing_shards(config, store)
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
    tail = _tail(store, name)
    return tail is not None and not exists(store.filesystem, f"{store.root}/{tail.file}")


def _tail(store: Store, name: str) -> WeightsFile | None:
    stream = store.manifest.streams[name]
    return stream.tail if isinstance(stream, TeacherStream) else None
