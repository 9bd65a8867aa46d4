"""`python -m tests.bench.scaling_commands WORK WAY WORKERS FOLDER UNITS`: a run for `scaling`.

A Ray cluster here has as many CPUs as there are workers, each of one thread, on any machine.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from schemas.extract import ExtractConfig
from schemas.run import RunConfig

SHARD_SIZE = 32
BATCH = 32
LOG_EVERY = 2
SETTLE_SECONDS = 5.0
"""Until the daemons of a new cluster are idle."""


def extraction(folder: Path, workers: int, store: str = "store") -> ExtractConfig:
    from pipeline.cli.config_files import merge
    from schemas.extract import PRESETS

    values = {"shard_size": SHARD_SIZE, "batch_size": 16, "actors": workers, "cpus_per_actor": 1}
    values |= {"dataset": "demo", "store": str(folder / store)}
    return ExtractConfig.model_validate(merge(PRESETS["demo"], values))


def training(folder: Path, workers: int, steps: int) -> RunConfig:
    import yaml

    from pipeline.cli.config_files import merge

    root = Path(__file__).parents[2]
    demo = yaml.safe_load((root / "jobs" / "configs" / "demo.yaml").read_text())
    values = {"store": str(folder.parent / "training-store"), "output": str(folder), "name": "run"}
    values |= {"steps": steps, "log_every": LOG_EVERY, "global_batch": BATCH}
    values |= {"workers": {"count": workers, "cpus_per_worker": 1}}
    return RunConfig.model_validate(merge(demo, values))


@contextmanager
def cluster(workers: int) -> Iterator[None]:
    """A local cluster of so many CPUs, or the one that this process is connected to."""
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    memory = 100 << 20
    ray.init(num_cpus=workers, logging_level="warning", object_store_memory=memory, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _sleep(seconds: float) -> None:
    """Ray takes no functions of C."""
    time.sleep(seconds)


def ray_idle(folder: Path, workers: int, units: int) -> None:
    """A cluster that does nothing for ``units`` seconds between two files."""
    import ray

    with cluster(workers):
        ray.get([ray.remote(_sleep).remote(1) for _ in range(workers)])
        time.sleep(SETTLE_SECONDS)
        (folder / "idle-begins").touch()
        time.sleep(units)
        (folder / "idle-ends").touch()
        time.sleep(1)  # for the second look at its processes


def ray_extraction(folder: Path, workers: int, units: int) -> None:
    from pipeline.extract.job import extract

    with cluster(workers):
        extract(extraction(folder, workers))


def ray_training(folder: Path, workers: int, units: int) -> None:
    from jobs.train_haste import train_run

    with cluster(workers):
        train_run(training(folder, workers, units))


def plain_training(folder: Path, workers: int, units: int) -> None:
    from tests.processes import train_on

    train_on(workers, training(folder, workers, units), folder / "run")


_encoder: Any = None


def _load(config: ExtractConfig) -> None:
    from pipeline.extract.encoder import Encoder

    global _encoder
    _encoder = Encoder(config, device="cpu", threads=1)
    _encoder.describe()


def _encode(arguments: tuple[Any, ...]) -> None:
    assert _encoder.encode_shard(*arguments).committed


def plain_extraction(folder: Path, workers: int, units: int) -> None:
    from pipeline.datasets import list_images
    from pipeline.extract.target_store import open_store
    from pipeline.extract.tasks import make_tasks

    config = extraction(folder, workers)
    listing = list_images(config)
    _load(config)
    store = open_store(config, listing, None, _encoder)
    tasks = [(store.url, store.manifest, task) for task in make_tasks(listing, config.shard_size)]
    with multiprocessing.get_context("spawn").Pool(workers, _load, (config,)) as pool:
        for _ in pool.imap_unordered(_encode, tasks):
            pass


COMMANDS = {
    "idle": {"ray": ray_idle},
    "extraction": {"plain": plain_extraction, "ray": ray_extraction},
    "training": {"plain": plain_training, "ray": ray_training},
}

if __name__ == "__main__":
    work, way, count, place, total = sys.argv[1:]
    COMMANDS[work][way](Path(place), int(count), int(total))
