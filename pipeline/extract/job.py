"""One extraction, from options to a complete store."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass

from tqdm import tqdm

from pipeline.datasets import Listing, list_images
from pipeline.distributed.ray_cluster import ray_cluster
from pipeline.distributed.resources import OptionNames, choose_resources
from pipeline.extract.compatibility import check_request, with_stores_options
from pipeline.extract.encoder_pool import EncoderPool
from pipeline.extract.hints import log_hints
from pipeline.extract.tasks import (
    ShardTask,
    make_manifest,
    make_stream,
    make_tasks,
    stream_name,
    with_tail,
)
from pipeline.storage.files import absolute_url, exists
from pipeline.storage.filesystem import with_absolute_paths
from pipeline.store import Store
from pipeline.store.layout import INDEX
from pipeline.store.manifest_diff import check_same_store
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.store import Manifest, SkippedImage, TeacherStream

RESOURCE_OPTIONS = OptionNames("--actors", "--cpus-per-actor", "--gpus-per-actor")
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
        existing.require_complete()
        config = with_stores_options(config, existing)
    if config.dataset != "demo" and config.source is None:
        raise UserError("--source is missing: the folder or URL of the images")
    config = with_absolute_paths(
        config, ["store", "source"], folders=["autoencoder"], weights=["teacher.weights"]
    )
    listing = list_images(config)
    name = stream_name(config)
    if existing is not None:
        check_request(config, listing, existing)
        # Weights of another name may have the same values: only loading them shows it.
        known = name in existing.manifest.streams and _same_weight_names(config, existing.manifest)
        if known and not existing.missing_shards(name) and not _lacks_tail(existing, name):
            if not exists(existing.filesystem, f"{existing.root}/{INDEX}"):
                existing.finish()
            return ExtractionSummary(0, 0.0, existing)
    with ray_cluster(config.ray_address):
        return _run(config, listing, existing)


def _run(config: ExtractConfig, listing: Listing, existing: Store | None) -> ExtractionSummary:
    name = stream_name(config)
    workers = choose_resources(
        config.actors, config.cpus_per_actor, config.gpus_per_actor, options=RESOURCE_OPTIONS
    )
    shards = -(-len(listing.items) // config.shard_size)
    if existing is not None and name in existing.manifest.streams:
        shards = len(existing.missing_shards(name))
    pool = EncoderPool(
        config,
        actors=max(1, min(workers.count, shards)),
        cpus=workers.threads,
        gpus=workers.gpus,
    )
    try:
        store = _open_store(config, listing, existing, pool)
        tasks = _missing_tasks(config, listing, store)
        images = sum(len(task.items) for task in tasks)
        encoded = 0
        bad: list[SkippedImage] = []
        start = time.perf_counter()
        with tqdm(total=images, unit="image", desc="extract", file=sys.stderr) as bar:
            for result in pool.encode(store.url, store.manifest, tasks):
                bar.update(result.samples + len(result.bad_images))
                encoded += result.samples
                bad.extend(result.bad_images)
        seconds = time.perf_counter() - start
    finally:
        pool.close()
    _report_bad_images(bad, config)
    store.finish()
    return ExtractionSummary(encoded, seconds, store)


def _open_store(
    config: ExtractConfig, listing: Listing, existing: Store | None, pool: EncoderPool
) -> Store:
    """The store with its manifest and the teacher's tail, ready for shards."""
    description = pool.describe()
    log_hints(config, listing, description)
    name = stream_name(config)
    if existing is None:
        assert config.store is not None
        manifest = make_manifest(config, listing, description)
        tail = pool.save_tail(config.store)
        return Store.create(config.store, with_tail(manifest, name, tail))
    manifest = existing.manifest
    if config.add_stream is None:
        check_same_store(manifest, make_manifest(config, listing, description), existing.shown_url)
    else:
        stream = make_stream(config, description)
        expected = manifest.model_copy(update={"streams": {**manifest.streams, name: stream}})
        if name not in manifest.streams:
            tail = pool.save_tail(existing.url)
            return Store.create(existing.url, with_tail(expected, name, tail))
        check_same_store(manifest, expected, existing.shown_url)
    if _lacks_tail(existing, name):
        pool.save_tail(existing.url)
    return existing


def _missing_tasks(config: ExtractConfig, listing: Listing, store: Store) -> list[ShardTask]:
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


def _lacks_tail(store: Store, name: str) -> bool:
    """True if the manifest names the tail of a stream whose file does not exist."""
    stream = store.manifest.streams[name]
    tail = stream.tail if isinstance(stream, TeacherStream) else None
    return tail is not None and not exists(store.filesystem, f"{store.root}/{tail.file}")


def _same_weight_names(config: ExtractConfig, manifest: Manifest) -> bool:
    stream = manifest.streams[stream_name(config)]
    assert isinstance(stream, TeacherStream)
    same = config.teacher.weights == stream.teacher.weights
    return same and (stream.added or config.autoencoder == manifest.autoencoder.name)


def _report_bad_images(bad: list[SkippedImage], config: ExtractConfig) -> None:
    """Log the bad images. Raises ``UserError`` with ``on_bad_image: stop``."""
    for image in bad:
        logger.warning("bad image: %s: %s", image.path, image.error)
    if bad and config.on_bad_image == "stop":
        more = f" and {len(bad) - 1} more, listed above" if len(bad) > 1 else ""
        raise UserError(
            f"bad image {bad[0].path} ({bad[0].error}){more}: repair or remove it, or use "
            "--on-bad-image skip; shards without bad images are committed"
        )
