"""Many images from a trained checkpoint, drawn by Ray workers: `jobs/sample.py --num`."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tqdm import tqdm

from pipeline.distributed.actor_pool import Actors
from pipeline.distributed.ray_cluster import ray_cluster, require, total
from pipeline.distributed.signals import StopSignals
from pipeline.sampling.batches import ImageBatch, choose_classes, choose_labels, plan_batches
from pipeline.sampling.outputs import FolderOutput, NpzOutput, Output
from pipeline.sampling.resume import already_complete, find_checkpoint_again
from pipeline.sampling.worker import Loaded, SampledBatch, SampleWorker
from pipeline.storage.files import absolute_folder, absolute_url, redact
from schemas.errors import StoppedError, UserError
from schemas.sample import SampleAbout, SampleConfig

MAX_CPU_WORKERS = 4
"""By default: each has the student and the decoder in memory."""


@dataclass(frozen=True)
class Sampled:
    """What there is now, and what this call did for it."""

    images: int
    npz: str | None
    folder: str | None
    seconds: float
    """From the moment that the first worker was ready, or none was needed, to the finished
    files."""
    images_per_second: float
    """Of the images that this call drew."""
    labels: str
    resumed: int
    """Images that an earlier call had drawn."""


def sample_many(config: SampleConfig) -> Sampled:
    """Draw the images that ``config`` asks for, as far as they are not there. Raises ``UserError``,
    and ``StoppedError`` after SIGTERM or Ctrl-C."""
    config = _with_absolute_paths(config)
    assert config.num is not None
    outputs = _outputs(config)
    blocks = plan_batches(config.num, config.batch_size)
    checkpoint = find_checkpoint_again(config, outputs)  # before any folder is made
    with ExitStack() as stack:
        for output in outputs:
            stack.enter_context(output.alone())
        began = time.perf_counter()
        about = already_complete(config, checkpoint, outputs, blocks)
        if about is not None:  # an earlier call may have been ended before it put them together
            return _finish(config, about, outputs, blocks, began, drawn=0)
        # the signals are taken once there is a connection: Ray puts its own handlers in their place
        stack.enter_context(ray_cluster(config.ray_address))
        signals = stack.enter_context(StopSignals(promise=None))

        def check_signals() -> None:
            if signals.received is not None:
                raise StoppedError(
                    f"{signals.received.name}: finished images are kept; run the same command "
                    "again to continue",
                    signals.exit_code,
                )

        try:
            return _sample(config, checkpoint, outputs, blocks, check_signals)
        except Exception:
            check_signals()  # a terminal's Ctrl-C reaches Ray's processes as well: no fault of ours
            raise


def _sample(
    config: SampleConfig,
    checkpoint: str,
    outputs: list[Output],
    blocks: list[ImageBatch],
    check_signals: Callable[[], None],
) -> Sampled:
    count, gpus = _resources(config)
    device: Literal["cpu", "cuda"] = "cuda" if gpus else "cpu"
    cpus = config.workers.cpus_per_worker
    workers: Actors[Loaded] = Actors(
        SampleWorker,
        lambda actor: actor.load.remote(config, checkpoint, device, max(1, int(cpus))),
        count=min(count, len(blocks)),
        cpus=cpus,
        gpus=gpus,
        max_attempts=config.workers.max_attempts,
        kind="sampling",
        check_same=_check_same,
        between=check_signals,
    )
    try:
        loaded = workers.describe()
        began = time.perf_counter()
        about = _about(config, checkpoint, loaded)
        missing: set[ImageBatch] = set()
        for output in outputs:
            output.open(about)
        for output in outputs:
            missing.update(output.missing(blocks))
        drawn = _draw(config, about, workers, outputs, sorted(missing, key=lambda b: b.number))
    finally:
        workers.close()
    return _finish(config, about, outputs, blocks, began, drawn)


def _finish(
    config: SampleConfig,
    about: SampleAbout,
    outputs: list[Output],
    blocks: list[ImageBatch],
    began: float,
    drawn: int,
) -> Sampled:
    """Leave what was asked for of images that are all there; this call drew ``drawn``."""
    labels = _labels(about, 0, about.num)
    for output in outputs:
        output.finish(blocks, labels)
    seconds = time.perf_counter() - began
    return Sampled(
        images=about.num,
        npz=config.npz,
        folder=config.folder,
        seconds=seconds,
        images_per_second=drawn / seconds,
        labels=config.labels,
        resumed=about.num - drawn,
    )


def _draw(
    config: SampleConfig,
    about: SampleAbout,
    workers: Actors[Loaded],
    outputs: list[Output],
    missing: list[ImageBatch],
) -> int:
    """Draw and keep these blocks; how many images that were."""
    images = sum(block.count for block in missing)
    there = about.num - images
    if there:
        _log(f"{there} of {about.num} images are there already")
    pngs = config.folder is not None

    def begin(worker: Any, block: ImageBatch) -> Any:
        return worker.draw.remote(block, _labels(about, block.first, block.count), pngs=pngs)

    def name(block: ImageBatch) -> str:
        return f"the batch of images {block.first} to {block.first + block.count - 1}"

    results: Iterator[SampledBatch] = workers.work(missing, begin, name=name)
    with tqdm(total=about.num, initial=there, unit="image", desc="sample", file=sys.stderr) as bar:
        for drawn in results:
            for output in outputs:
                output.write(drawn)
            bar.update(drawn.block.count)
    return images


def _labels(about: SampleAbout, first: int, count: int) -> list[int]:
    return choose_labels(about.labels, about.classes, about.sampler.seed, first, count)


def _about(config: SampleConfig, checkpoint: str, loaded: Loaded) -> SampleAbout:
    values = asdict(loaded)
    classes = choose_classes(config.classes, values.pop("num_classes"))
    assert config.num is not None
    return SampleAbout(
        **values,
        checkpoint=redact(checkpoint),
        weights=config.weights,
        num=config.num,
        labels=config.labels,
        classes=classes,
        batch_size=config.batch_size,
        sampler=config.sampler,
        version=importlib.metadata.version("haste-pipeline"),
    )


def _outputs(config: SampleConfig) -> list[Output]:
    outputs: list[Output] = []
    if config.npz is not None:
        outputs.append(NpzOutput(config.npz))
    if config.folder is not None:
        outputs.append(FolderOutput(config.folder))
    return outputs


def _resources(config: SampleConfig) -> tuple[int, float]:
    """Workers, and GPUs of each, fitted to the cluster."""
    workers = config.workers
    gpus = workers.gpus_per_worker
    if config.device == "cpu":
        if gpus:
            raise UserError("--device cpu and --workers.gpus-per-worker exclude each other")
        gpus = 0.0
    elif gpus is None:
        gpus = 1.0 if config.device == "cuda" or total("GPU") else 0.0
    elif not gpus and config.device == "cuda":
        raise UserError("--device cuda needs --workers.gpus-per-worker above 0")
    if gpus:
        option = "--workers.count" if workers.count else "--workers.gpus-per-worker"
        require("GPU", gpus, workers.count or 1, option=option)
        count = workers.count or int(total("GPU") // gpus)
    else:
        fitting = max(1, int(total("CPU") // workers.cpus_per_worker))
        count = workers.count or min(MAX_CPU_WORKERS, fitting)
    option = "--workers.count" if workers.count else "--workers.cpus-per-worker"
    require("CPU", workers.cpus_per_worker, count, option=option)
    return count, gpus


def _with_absolute_paths(config: SampleConfig) -> SampleConfig:
    """Local paths made absolute: workers run in another folder."""
    update: dict[str, Any] = {}
    for key in ("npz", "folder"):
        value = getattr(config, key)
        if value is not None:
            update[key] = absolute_url(value)
    if config.autoencoder is not None:
        update["autoencoder"] = absolute_folder(config.autoencoder)
    return config.model_copy(update=update)


def _check_same(one: Loaded, other: Loaded) -> None:
    a, b = asdict(one), asdict(other)
    for key in a:
        if a[key] != b[key]:
            raise UserError(
                f"workers draw with different {key}: {a[key]} and {b[key]}; give every node the "
                "same checkpoint, decoder and kind of device"
            )


def _log(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
