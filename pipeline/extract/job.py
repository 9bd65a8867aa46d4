"""One extraction from options to a complete store."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pipeline.cluster import ray_cluster, require, total
from pipeline.datasets import Listing, list_images
from pipeline.extract.plan import make_manifest, make_tasks
from pipeline.extract.supervisor import Supervisor
from pipeline.files import absolute_url
from pipeline.store import Store
from pipeline.store.layout import INDEX
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.store import Manifest, SkippedImage


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
    """Make or complete the store that ``config`` describes. Raises ``UserError``."""
    config = _with_absolute_paths(config)
    assert config.store is not None
    existing = Store.open(config.store) if Store.exists(config.store) else None
    listing = list_images(config)
    if existing is not None:
        _check_request(config, listing, existing)
        # Weights named otherwise may still be the same ones: only loading them tells.
        whole = not existing.missing_shards() and not _lacks_tail(existing)
        if whole and _same_weight_names(config, existing.manifest):
            if not _is_finished(existing):
                existing.finish()
            return ExtractionSummary(0, 0.0, existing)
    with ray_cluster(config.ray_address):
        return _run(config, listing, existing)


def _run(config: ExtractConfig, listing: Listing, existing: Store | None) -> ExtractionSummary:
    actors, cpus, gpus = _resources(config)
    missing = None if existing is None else len(existing.missing_shards())
    shards = -(-len(listing.items) // config.shard_size) if missing is None else missing
    supervisor = Supervisor(
        config, actors=max(1, min(actors, shards)), cpus=cpus, gpus=gpus, log=_log
    )
    try:
        description = supervisor.describe()
        manifest = make_manifest(
            config, listing, description.teacher, description.autoencoder, description.compute
        )
        if existing is not None:
            check_same_store(existing.manifest, manifest, existing.shown_url)
            store = existing
            if _lacks_tail(store):
                supervisor.save_tail(store.url)
        else:
            assert config.store is not None
            tail = supervisor.save_tail(config.store)
            store = Store.create(config.store, manifest.model_copy(update={"tail": tail}))
        wanted = set(store.missing_shards())
        tasks = [task for task in make_tasks(listing, config.shard_size) if task.shard in wanted]
        images = sum(len(task.items) for task in tasks)
        done = 0
        bad: list[SkippedImage] = []
        began = time.perf_counter()
        streams = store.manifest.streams
        with tqdm(total=images, unit="image", desc="extract", file=sys.stderr) as bar:
            for result in supervisor.encode(store.url, streams, tasks):
                bar.update(result.samples + len(result.bad_images))
                done += result.samples
                bad.extend(result.bad_images)
        seconds = time.perf_counter() - began
    finally:
        supervisor.close()
    _report_bad(bad, config)
    store.finish()
    return ExtractionSummary(done, seconds, store)


def check_same_store(old: Manifest, new: Manifest, url: str) -> None:
    """Raises ``UserError`` where shards made now would not fit those that a store already has."""
    a, b = old.model_dump(), new.model_dump()
    for values in (a, b):  # where files lie is not what they are
        values.pop("skipped")
        values.pop("tail")
        values["dataset"].pop("source")
        values["teacher"].pop("weights")
        if values["autoencoder"]["weights_sha256"] is not None:
            values["autoencoder"].pop("name")
    for path, was, now in _differences(a, b):
        raise UserError(
            f"store '{url}' was made with {path} {was}, this extraction has {now}: use another "
            "--store or the same options"
        )


def _differences(a: object, b: object, path: str = "") -> list[tuple[str, object, object]]:
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in sorted(a.keys() | b.keys()):
            found += _differences(a.get(key), b.get(key), f"{path}.{key}".lstrip("."))
        return found
    return [] if a == b else [(path, a, b)]


def _check_request(config: ExtractConfig, listing: Listing, store: Store) -> None:
    """What can be told without loading weights."""
    manifest = store.manifest
    asked = {
        "resolution": (manifest.resolution, config.resolution),
        "cut": (manifest.cut, config.cut),
        "format": (manifest.format, config.format),
        "layers": (manifest.teacher.layers, config.layers),
        "codec": (_codec(manifest) or config.codec, config.codec),
        "shard_size": (manifest.shard_size, config.shard_size),
        "batch_size": (manifest.compute.batch_size, config.batch_size),
        "order_seed": (manifest.dataset.order_seed, config.order_seed),
        "teacher.model": (manifest.teacher.model, config.teacher.model),
        "teacher.seed": (manifest.teacher.seed, config.teacher.seed),
        "teacher.model_args": (manifest.teacher.model_args, config.teacher.model_args),
        "the images": (manifest.dataset.fingerprint[:12], listing.fingerprint()[:12]),
    }
    for name, (was, now) in asked.items():
        if was != now:
            raise UserError(
                f"store '{store.shown_url}' was made with {name} {_plain(was)}, this extraction "
                f"has {_plain(now)}: use another --store or the same options"
            )


def _codec(manifest: Manifest) -> str | None:
    """That of the teacher's tensors; None where the cut keeps none."""
    maps = manifest.streams.get("maps")
    return None if maps is None else maps.columns["features"].codec


def _lacks_tail(store: Store) -> bool:
    tail = store.manifest.tail
    return tail is not None and not store.filesystem.exists(f"{store.root}/{tail.file}")


def _same_weight_names(config: ExtractConfig, manifest: Manifest) -> bool:
    return (config.teacher.weights, config.autoencoder) == (
        manifest.teacher.weights,
        manifest.autoencoder.name,
    )


def _is_finished(store: Store) -> bool:
    return bool(store.filesystem.exists(f"{store.root}/{INDEX}"))


def _resources(config: ExtractConfig) -> tuple[int, int, float]:
    """Actors, CPUs and GPUs of each, fitted to the cluster."""
    cpus, gpus = total("CPU"), total("GPU")
    each_gpu = config.gpus_per_actor
    if each_gpu is None:
        each_gpu = 1.0 if gpus else 0.0
    if each_gpu:
        require("GPU", each_gpu, config.actors or 1, option="--gpus-per-actor")
        actors = config.actors or int(gpus // each_gpu)
        share = max(1, int(cpus // actors))
        each_cpu = config.cpus_per_actor or min(8, share)
    else:
        each_cpu = config.cpus_per_actor or 1
        actors = config.actors or max(1, int(cpus // each_cpu))
    option = "--actors" if config.actors else "--cpus-per-actor"
    require("CPU", each_cpu, actors, option=option)
    return actors, each_cpu, each_gpu


def _with_absolute_paths(config: ExtractConfig) -> ExtractConfig:
    """Local paths made absolute, since actors run in another folder."""
    if config.store is None:
        raise UserError("--store is missing: the folder or URL of the store to make")
    if config.dataset != "demo" and config.source is None:
        raise UserError("--source is missing: the folder or URL of the images")
    update: dict[str, object] = {"store": absolute_url(config.store)}
    if config.source is not None:
        update["source"] = absolute_url(config.source)
    if Path(config.autoencoder).expanduser().is_dir():
        update["autoencoder"] = absolute_url(config.autoencoder)
    weights = config.teacher.weights
    if weights not in {"hub", "random", "demo"}:
        update["teacher"] = config.teacher.model_copy(update={"weights": absolute_url(weights)})
    return config.model_copy(update=update)


def _report_bad(bad: list[SkippedImage], config: ExtractConfig) -> None:
    for image in bad:
        _log(f"bad image: {image.path}: {image.error}")
    if bad and config.on_bad_image == "stop":
        more = f" and {len(bad) - 1} more, listed above" if len(bad) > 1 else ""
        raise UserError(
            f"bad image {bad[0].path} ({bad[0].error}){more}: mend or remove it, or run with "
            "--on-bad-image skip; shards without bad images are kept"
        )


def _plain(value: object) -> str:
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def _log(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
