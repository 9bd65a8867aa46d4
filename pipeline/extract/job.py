"""One extraction from options to a complete store."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tqdm import tqdm

from pipeline.datasets import Listing, list_images
from pipeline.distributed.ray_cluster import ray_cluster
from pipeline.distributed.resources import OptionNames, choose_resources
from pipeline.extract.compatibility import check_request, with_stores_options
from pipeline.extract.encoder_pool import Supervisor
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


@dataclass(frozen=True)
class ExtractionSummary:
    """What an extraction did."""

    images: int
    """Images encoded by this call; 0 where nothing was missing."""
    seconds: float
    """From the moment that the encoders were ready."""
    store: Store

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def extract(config: ExtractConfig) -> ExtractionSummary:
    """Make or complete the store that ``config`` describes, or add a teacher stream to it. Raises
    ``UserError``."""
    if config.store is None:
        raise UserError("--store is missing: the folder or URL of the store to make")
    store_url = absolute_url(config.store)
    existing = Store.open(store_url) if Store.exists(store_url) else None
    if config.add_stream is not None:
        if existing is None:
            raise UserError(f"--add-stream needs a store; '{config.store}' holds none")
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
        # Weights named otherwise may still be the same ones: only loading them tells.
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
    supervisor = Supervisor(
        config,
        actors=max(1, min(workers.count, shards)),
        cpus=workers.threads,
        gpus=workers.gpus,
    )
    try:
        store = _open_store(config, listing, existing, supervisor)
        tasks = _missing_tasks(config, listing, store)
        images = sum(len(task.items) for task in tasks)
        done = 0
        bad: list[SkippedImage] = []
        began = time.perf_counter()
        with tqdm(total=images, unit="image", desc="extract", file=sys.stderr) as bar:
            for result in supervisor.encode(store.url, store.manifest, tasks):
                bar.update(result.samples + len(result.bad_images))
                done += result.samples
                bad.extend(result.bad_images)
        seconds = time.perf_counter() - began
    finally:
        supervisor.close()
    _report_bad(bad, config)
    store.finish()
    return ExtractionSummary(done, seconds, store)


def _open_store(
    config: ExtractConfig, listing: Listing, existing: Store | None, supervisor: Supervisor
) -> Store:
    """The store with its manifest and the teacher's tail, ready for shards."""
    about = supervisor.describe()
    name = stream_name(config)
    if existing is None:
        assert config.store is not None
        manifest = make_manifest(config, listing, about)
        tail = supervisor.save_tail(config.store)
        return Store.create(config.store, with_tail(manifest, name, tail))
    manifest = existing.manifest
    if config.add_stream is None:
        check_same_store(manifest, make_manifest(config, listing, about), existing.shown_url)
    else:
        stream = make_stream(config, about)
        wanted = manifest.model_copy(update={"streams": {**manifest.streams, name: stream}})
        if name not in manifest.streams:
            tail = supervisor.save_tail(existing.url)
            return Store.create(existing.url, with_tail(wanted, name, tail))
        check_same_store(manifest, wanted, existing.shown_url)
    if _lacks_tail(existing, name):
        supervisor.save_tail(existing.url)
    return existing


def _missing_tasks(config: ExtractConfig, listing: Listing, store: Store) -> list[ShardTask]:
    """Shards that the stream lacks; an added one takes the samples that the store has."""
    wanted = set(store.missing_shards(stream_name(config)))
    tasks = [task for task in make_tasks(listing, config.shard_size) if task.shard in wanted]
    if config.add_stream is None:
        return tasks
    kept = []
    for task in tasks:
        keys = set(store.record(task.shard).keys)
        kept.append(ShardTask(task.shard, tuple(i for i in task.items if i.key in keys)))
    return kept


def _lacks_tail(store: Store, name: str) -> bool:
    stream = store.manifest.streams[name]
    tail = stream.tail if isinstance(stream, TeacherStream) else None
    return tail is not None and not exists(store.filesystem, f"{store.root}/{tail.file}")


def _same_weight_names(config: ExtractConfig, manifest: Manifest) -> bool:
    stream = manifest.streams[stream_name(config)]
    assert isinstance(stream, TeacherStream)
    same = config.teacher.weights == stream.teacher.weights
    return same and (stream.added or config.autoencoder == manifest.autoencoder.name)


def _report_bad(bad: list[SkippedImage], config: ExtractConfig) -> None:
    for image in bad:
        _log(f"bad image: {image.path}: {image.error}")
    if bad and config.on_bad_image == "stop":
        more = f" and {len(bad) - 1} more, listed above" if len(bad) > 1 else ""
        raise UserError(
            f"bad image {bad[0].path} ({bad[0].error}){more}: mend or remove it, or run with "
            "--on-bad-image skip; shards without bad images are kept"
        )


def _log(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
