"""One extraction, from options to a complete store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipeline.cli.progress import progress_bar, saying
from pipeline.datasets import Listing, list_images
from pipeline.datasets.listing import describe_image
from pipeline.datasets.listing_check import short_name
from pipeline.extract.captions import text_stream_name, with_captions
from pipeline.extract.compatibility import check_request, with_stores_options
from pipeline.extract.target_store import (
    lacks_tail,
    lost_nulls,
    missing_shards,
    missing_tasks,
    open_store,
)
from pipeline.extract.tasks import stream_name
from pipeline.storage.files import absolute_url, exists
from pipeline.storage.filesystem import with_absolute_paths
from pipeline.store import Store
from pipeline.store.layout import INDEX
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.store import Manifest, SkippedImage
from schemas.streams import TeacherStream, TextStream

if TYPE_CHECKING:
    from pipeline.extract.encoder import ShardResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractionSummary:
    """Result of one call of ``extract``."""

    images: int
    """Images encoded by this call; 0 if nothing was missing."""
    seconds: float
    """Encoding time, without loading the encoders."""
    store: Store

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def extract(config: ExtractConfig) -> ExtractionSummary:
    """Create or complete the store that ``config`` describes, or add a teacher stream to it.
    Raises ``UserError``."""
    if config.store is None:
        raise UserError("--store is missing: the folder or URL of the store")
    store_url = absolute_url(config.store)
    existing = Store.open(store_url) if Store.exists(store_url) else None
    if config.add_stream is not None:
        if existing is None:
            raise UserError(f"--add-stream needs a store, but '{config.store}' has none")
        from pipeline.convert.class_stream import is_class_stream  # torch takes seconds to import

        if is_class_stream(config.add_stream, existing.manifest):
            return _add_class_stream(config, existing)
        existing.require_complete()
        config = with_stores_options(config, existing)
    if config.dataset != "demo" and config.source is None:
        raise UserError("--source is missing: the folder or URL of the images")
    if config.pretrain is not None and config.add_stream is None:
        from pipeline.pretrain.networks import train_missing

        train_missing(config)
    config = with_absolute_paths(
        config,
        ["store", "source", *(["captions"] if config.dataset == "folder" else [])],
        folders=["autoencoder", "text.encoder", "text.tokenizer"],
        weights=["teacher.weights", "text.weights"],
    )
    with saying("listing the images"):
        listing = list_images(config, _stored_names(config, existing))
    logger.info("%s images", f"{len(listing.items):,}")
    config = with_captions(config, listing)
    name = stream_name(config)
    if existing is not None:
        check_request(config, listing, existing)
        # Weights of another name may have the same values: only loading them shows it.
        known = name in existing.manifest.streams and _same_weight_names(config, existing.manifest)
        if known and not missing_shards(config, existing) and not _lost_files(config, existing):
            if not exists(existing.filesystem, f"{existing.root}/{INDEX}"):
                _finish(existing, listing)
            _check_left_empty(config, listing, existing)
            return ExtractionSummary(0, 0.0, existing)
    from pipeline.distributed.ray_cluster import ray_cluster  # Ray takes a second to import

    with ray_cluster(config.ray_address):
        return _run(config, listing, existing)


CLASS_STREAM_OPTIONS = {"store", "add_stream", "class_token", "column_codecs"}


def _add_class_stream(config: ExtractConfig, store: Store) -> ExtractionSummary:
    """Compute class tokens from the store itself. Raises ``UserError``."""
    assert config.add_stream is not None
    unused = sorted(config.model_fields_set - CLASS_STREAM_OPTIONS)
    unused += sorted(
        f"column_codecs.{name}" for name in config.column_codecs.keys() - {"class_token"}
    )
    if unused:
        option = unused[0].replace("_", "-")
        raise UserError(
            f"--add-stream {config.add_stream} computes class tokens from the store, with its "
            f"teacher and precision: leave out --{option}"
        )
    if config.class_token == "none":
        raise UserError(f"--add-stream {config.add_stream} --class-token none adds nothing")
    start = time.perf_counter()
    from pipeline.convert.class_stream import add_class_stream

    store, samples = add_class_stream(
        store,
        config.add_stream,
        config.class_token,
        codec=config.column_codecs.get("class_token"),
    )
    return ExtractionSummary(samples, time.perf_counter() - start, store)


def _lost_files(config: ExtractConfig, store: Store) -> bool:
    """True if the store lacks the tail or the null caption of the extraction's streams."""
    captions = text_stream_name(config)
    return lacks_tail(store, stream_name(config)) or captions in lost_nulls(store)


class _Progress:
    """Moves the bar by batch: the images of finished shards and those that are done of running
    ones, whose reports come from another thread and may be late, or begin again after a failure."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar
        self._lock = threading.Lock()
        self._done: dict[int, int] = {}
        self._finished: set[int] = set()

    def running(self, shard: int, done: int) -> None:
        with self._lock:
            if shard not in self._finished:
                self._show(shard, done)

    def finished(self, result: ShardResult) -> None:
        with self._lock:
            self._finished.add(result.shard)
            self._show(result.shard, result.samples + len(result.bad_images))

    def _show(self, shard: int, done: int) -> None:
        self._bar.update(done - self._done.get(shard, 0))
        self._done[shard] = done


def _run(config: ExtractConfig, listing: Listing, existing: Store | None) -> ExtractionSummary:
    from pipeline.distributed.log_relay import ProgressHandler
    from pipeline.distributed.resources import OptionNames, choose_resources
    from pipeline.extract.encoder_pool import EncoderPool
    from pipeline.extract.hints import log_hints

    name = stream_name(config)
    workers = choose_resources(
        config.actors,
        config.cpus_per_actor,
        config.gpus_per_actor,
        options=OptionNames("--actors", "--cpus-per-actor", "--gpus-per-actor"),
    )
    shards = -(-len(listing.items) // config.shard_size)
    if existing is not None and name in existing.manifest.streams:
        shards = len(missing_shards(config, existing))
    pool = EncoderPool(
        config,
        actors=max(1, min(workers.count, shards)),
        cpus=workers.threads,
        gpus=workers.gpus,
    )
    try:
        log_hints(config, listing, pool.describe())
        store = open_store(config, listing, existing, pool)
        tasks = missing_tasks(config, listing, store)
        images = sum(len(task.items) for task in tasks)
        encoded = 0
        bad: list[SkippedImage] = []
        start = time.perf_counter()
        with (
            progress_bar(total=images, unit="image", desc="extract") as bar,
            ProgressHandler((progress := _Progress(bar)).running),
        ):
            for result in pool.encode(store.url, store.manifest, tasks):
                progress.finished(result)
                encoded += result.samples
                bad.extend(result.bad_images)
        seconds = time.perf_counter() - start
    finally:
        pool.close()
    _report_bad_images(bad, config)
    _finish(store, listing)
    _check_left_empty(config, listing, store)
    return ExtractionSummary(encoded, seconds, store)


def _stored_names(config: ExtractConfig, store: Store | None) -> Sequence[str]:
    """Class names of the store that gets another stream, which has its classes."""
    return () if store is None or config.add_stream is None else store.manifest.dataset.class_names


def _finish(store: Store, listing: Listing) -> None:
    """Finish the store; classes whose every image was skipped are without images from now on."""

    def empty_classes(skipped: Collection[str]) -> list[int]:
        stored = {item.label for item in listing.items if item.key not in skipped}
        emptied = {item.label for item in listing.items} - stored
        return sorted({*listing.empty_classes, *emptied})

    store.finish(empty_classes)


def _check_left_empty(config: ExtractConfig, listing: Listing, store: Store) -> None:
    """Raises ``UserError`` naming a class whose every image was skipped as bad."""
    if config.allow_empty_classes or config.add_stream is not None:
        return
    left = sorted(set(store.manifest.dataset.empty_classes) - set(listing.empty_classes))
    if not left:
        return
    name = short_name(listing.class_names[left[0]]) if listing.class_names else left[0]
    images = {item.key for item in listing.items if item.label == left[0]}
    first = next(image for image in store.manifest.skipped if image.key in images)
    more = f" and {len(left) - 1} more classes" if len(left) > 1 else ""
    raise UserError(
        f"class '{name}'{more} of store '{store.shown_url}' has no image left: all {len(images)} "
        f"were skipped, first {first.path} ({first.error}); repair them and use another --store, "
        "or keep it as a class without images with --allow-empty-classes"
    )


def _same_weight_names(config: ExtractConfig, manifest: Manifest) -> bool:
    stream = manifest.streams[stream_name(config)]
    if isinstance(stream, TextStream):
        return config.text.weights == stream.encoder.weights
    assert isinstance(stream, TeacherStream)
    same = config.teacher.weights == stream.teacher.weights
    return same and (stream.added or config.autoencoder == manifest.autoencoder.name)


def _report_bad_images(bad: list[SkippedImage], config: ExtractConfig) -> None:
    """Log the bad images. Raises ``UserError`` with ``on_bad_image: stop``."""
    shown = [describe_image(config.dataset, image.key, image.path) for image in bad]
    for where, image in zip(shown, bad, strict=True):
        logger.warning("bad image: %s: %s", where, image.error)
    if bad and config.on_bad_image == "stop":
        more = f" and {len(bad) - 1} more, listed above" if len(bad) > 1 else ""
        raise UserError(
            f"bad image {shown[0]} ({bad[0].error}){more}: repair or remove it, or use "
            "--on-bad-image skip; shards without bad images are committed"
        )
