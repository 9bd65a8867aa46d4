"""The driver of an extraction against many simulated encoders: its own CPU time per shard.

A few Ray actors stand for all encoders: each call arrives, reports its progress and returns as one
of a real encoder does, and leaves a commit record in the store; nothing is encoded. The driver
runs its real code, with one actor handle and one call under way for each simulated encoder.
"""

from __future__ import annotations

import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import ray

from pipeline.cli.progress import progress_bar
from pipeline.datasets import ImageItem, Listing
from pipeline.distributed.log_relay import (
    ProgressHandler,
    relayed_logs,
    send_progress,
    set_up_worker_logging,
)
from pipeline.extract.encoder import ShardResult
from pipeline.extract.encoder_pool import EncoderActor, EncoderPool
from pipeline.extract.job import _finish, _Progress
from pipeline.extract.tasks import Description, ShardTask, make_tasks
from pipeline.storage.files import open_url, write_atomic
from pipeline.store import Store
from pipeline.store.layout import commit_path
from schemas.extract import ExtractConfig
from schemas.store import CommitRecord, Manifest
from schemas.streams import ComputeInfo
from tests.bench.report import Row
from tests.bench.scaling_commands import cluster
from tests.stores import COMPUTE, make_random_store, random_manifest

CLASSES = 1000
HOSTS = 2
"""Actors that stand for all encoders."""


class CommittingActor(EncoderActor):
    """Stands for many encoders: commits shards without encoding images."""

    def __init__(self, record: CommitRecord) -> None:
        self.record = record

    def load(self, config: ExtractConfig, device: str, threads: int) -> Description:
        set_up_worker_logging()
        return Description(
            teacher=None, autoencoder=None, compute=ComputeInfo.model_validate(COMPUTE)
        )

    def encode(self, url: str, manifest: Manifest, task: ShardTask) -> ShardResult:
        send_progress(task.shard, len(task.items))
        keys = [item.key for item in task.items]
        record = self.record.model_copy(update={"shard": task.shard, "keys": keys})
        filesystem, root = open_url(url, what="--store")
        path = f"{root}/{commit_path(task.shard)}"
        write_atomic(filesystem, path, record.model_dump_json().encode())
        return ShardResult(task.shard, len(keys), (), committed=True)


class SimulatedPool(EncoderPool):
    """Encoders that share a few actors."""

    def __init__(self, config: ExtractConfig, encoders: int, record: CommitRecord) -> None:
        hosted = ray.remote(CommittingActor).options(num_cpus=0)
        self._hosts = cycle([hosted.remote(record) for _ in range(HOSTS)])
        super().__init__(config, actors=encoders, cpus=1, gpus=0)

    def _spawn(self, deaths: int = 0) -> None:
        actor: Any = next(self._hosts)
        self._loading[self.load(actor)] = (actor, deaths)


def measure(encoders: int, shards: int) -> Row:
    """CPU seconds of this process, with all of its threads, per 1,000 shards."""
    config = ExtractConfig(shard_size=64)
    names = tuple(f"synset n{number:08d}, a class of images" for number in range(CLASSES))
    items = [
        ImageItem(f"n{n % CLASSES:08d}/n{n % CLASSES:08d}_{n}", n % CLASSES, f"train/{n}.JPEG")
        for n in range(shards * config.shard_size)
    ]
    listing = Listing(items, CLASSES, names)
    manifest = random_manifest(len(items), config.shard_size)
    dataset = manifest.dataset.model_copy(update={"num_classes": CLASSES, "class_names": names})
    manifest = manifest.model_copy(update={"dataset": dataset})
    with tempfile.TemporaryDirectory(prefix="haste-bench-") as folder:
        sample = make_random_store(Path(folder) / "sample", config.shard_size, config.shard_size)
        store = Store.create(str(Path(folder) / "store"), manifest)
        with cluster(1), relayed_logs():
            pool = SimulatedPool(config, encoders, sample.record(0))
            pool.describe()
            while len(pool._idle) < encoders:
                pool._wait(pool._patience())
            began, started = time.perf_counter(), time.process_time()
            tasks = make_tasks(listing, config.shard_size)
            with progress_bar(total=len(items), unit="image", desc="extract") as bar:
                progress = _Progress(bar)
                with ProgressHandler(progress.running):
                    for result in pool.encode(store.url, store.manifest, tasks):
                        progress.finished(result)
            handed, seconds = time.process_time() - started, time.perf_counter() - began
            started = time.process_time()
            _finish(store, listing)
            finished = time.process_time() - started
    per_thousand = 1000 / shards
    return {
        "encoders": encoders,
        "shards": shards,
        "cpu_seconds": handed * per_thousand,
        "index_cpu_seconds": finished * per_thousand,
        "shards_per_cpu_second": shards / handed,
        "wall_shards_per_second": shards / seconds,
    }
