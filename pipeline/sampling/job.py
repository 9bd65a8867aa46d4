"""Many single images from a trained checkpoint, drawn by Ray workers: `jobs/sample.py --num`."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cli.interrupts import CONTINUES
from pipeline.cli.progress import progress_bar
from pipeline.distributed.actor_pool import Actors
from pipeline.distributed.ray_cluster import ray_cluster
from pipeline.distributed.resources import OptionNames, WorkerResources, choose_resources
from pipeline.distributed.signals import StopSignals
from pipeline.sampling.batches import ImageBatch, choose_classes, choose_labels, plan_batches
from pipeline.sampling.options import check_options
from pipeline.sampling.outputs import FolderOutput, NpzOutput, Output
from pipeline.sampling.prompts import GivenPrompts, Prompts, open_prompts
from pipeline.sampling.resume import find_checkpoint_to_resume, info_of_complete_images
from pipeline.sampling.worker import SampledBatch, SampleWorker, WorkerInfo
from pipeline.storage.files import redact
from pipeline.storage.filesystem import with_absolute_paths
from pipeline.store.manifest_diff import differences
from schemas.errors import StoppedError, UserError
from schemas.sample import SampleAbout, SampleConfig

logger = logging.getLogger(__name__)

MAX_CPU_WORKERS = 4
"""Default limit, because each worker holds the student and the decoder in memory."""
CAPTIONS = 1024
"""Captions of a store that are read at a time."""


@dataclass(frozen=True)
class SampleSummary:
    """Result of ``sample_many``."""

    images: int
    npz: str | None
    folder: str | None
    seconds: float
    """From the first worker being ready, or from the start where no worker is needed, to the
    finished files."""
    images_per_second: float
    """Rate of the images that this call drew."""
    labels: str
    resumed: int
    """Images that an earlier call had drawn."""

    @property
    def files(self) -> list[str]:
        return [place for place in (self.npz, self.folder) if place is not None]


def sample_many(config: SampleConfig) -> SampleSummary:
    """Draw those of the requested images that do not exist yet. Raises ``UserError``, and
    ``StoppedError`` after SIGTERM or Ctrl-C."""
    check_options(config)
    config = with_absolute_paths(
        config,
        ["npz", "folder", "captions", "store"],
        folders=["autoencoder", "text.encoder", "text.tokenizer"],
        weights=["text.weights"],
    )
    assert config.num is not None
    outputs = _open_outputs(config)
    batches = plan_batches(config.num, config.batch_size)
    checkpoint = find_checkpoint_to_resume(config, outputs)  # before any folder is created
    prompts = open_prompts(config)
    with ExitStack() as stack:
        for output in outputs:
            stack.enter_context(output.lock())
        started = time.perf_counter()
        info = info_of_complete_images(config, checkpoint, outputs, batches, prompts)
        if info is not None:  # an earlier call may have been stopped before it finished the files
            return _finish(config, info, prompts, outputs, batches, started, drawn=0)
        # signal handlers come after the connection, because Ray installs its own ones
        stack.enter_context(ray_cluster(config.ray_address))
        signals = stack.enter_context(StopSignals(CONTINUES))

        def check_signals() -> None:
            if signals.received is not None:
                raise StoppedError(
                    f"{signals.received.name}: finished images are kept; run the same command "
                    "again to continue",
                    signals.exit_code,
                )

        try:
            return _sample(config, checkpoint, prompts, outputs, batches, check_signals)
        except Exception:
            check_signals()  # Ctrl-C in a terminal also stops Ray's processes, which is not a fault
            raise


def describe_images(config: SampleConfig, checkpoint: str, worker: WorkerInfo) -> SampleAbout:
    """Contents of ``about.json`` for the images that such workers draw."""
    values = {key: value for key, value in asdict(worker).items() if key != "classes"}
    classes = () if worker.text is not None else choose_classes(config.classes, worker.classes)
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


def _open_outputs(config: SampleConfig) -> list[Output]:
    outputs: list[Output] = []
    if config.npz is not None:
        outputs.append(NpzOutput(config.npz))
    if config.folder is not None:
        outputs.append(FolderOutput(config.folder))
    return outputs


def _sample(
    config: SampleConfig,
    checkpoint: str,
    prompts: Prompts | None,
    outputs: Sequence[Output],
    batches: Sequence[ImageBatch],
    check_signals: Callable[[], None],
) -> SampleSummary:
    resources = _choose_resources(config)
    # a file of captions may be on this machine only
    given = prompts if isinstance(prompts, GivenPrompts) else None
    workers: Actors[WorkerInfo] = Actors(
        SampleWorker,
        lambda actor: actor.load.remote(
            config, checkpoint, resources.device, resources.threads, given
        ),
        count=min(resources.count, len(batches)),
        cpus=resources.cpus,
        gpus=resources.gpus,
        max_attempts=config.workers.max_attempts,
        kind="sampling",
        check_same=_check_same,
        between=check_signals,
    )
    try:
        worker = workers.describe()
        started = time.perf_counter()
        info = describe_images(config, checkpoint, worker)
        for output in outputs:
            output.open(info)
        missing = {batch for output in outputs for batch in output.missing(batches)}
        drawn = _draw(config, info, workers, outputs, sorted(missing, key=lambda b: b.number))
    finally:
        workers.close()
    return _finish(config, info, prompts, outputs, batches, started, drawn)


def _choose_resources(config: SampleConfig) -> WorkerResources:
    workers = config.workers
    gpus = workers.gpus_per_worker
    if config.device == "cpu":
        if gpus:
            raise UserError("--device cpu and --workers.gpus-per-worker exclude each other")
        gpus = 0.0
    elif config.device == "cuda":
        if gpus == 0:
            raise UserError("--device cuda needs --workers.gpus-per-worker above 0")
        gpus = gpus or 1.0
    return choose_resources(
        workers.count,
        workers.cpus_per_worker,
        gpus,
        options=OptionNames(
            "--workers.count", "--workers.cpus-per-worker", "--workers.gpus-per-worker"
        ),
        max_cpu_workers=MAX_CPU_WORKERS,
    )


def _check_same(one: WorkerInfo, other: WorkerInfo) -> None:
    for key, a, b in differences(asdict(one), asdict(other), []):
        raise UserError(
            f"workers draw with different {key}: {a} and {b}; give every node the same "
            "checkpoint, decoder and type of device"
        )


def _draw(
    config: SampleConfig,
    info: SampleAbout,
    workers: Actors[WorkerInfo],
    outputs: Sequence[Output],
    missing: Sequence[ImageBatch],
) -> int:
    """Draw and write these batches. Returns the number of images drawn."""
    images = sum(batch.count for batch in missing)
    existing = info.num - images
    if existing:
        logger.info("%d of %d images exist already", existing, info.num)
    pngs = config.folder is not None

    def begin(worker: Any, batch: ImageBatch) -> Any:
        return worker.draw.remote(batch, _labels(info, batch.first, batch.count), pngs=pngs)

    def name(batch: ImageBatch) -> str:
        return f"the batch of images {batch.first} to {batch.last}"

    results: Iterator[SampledBatch] = workers.work(missing, begin, name=name)
    progress = progress_bar(total=info.num, initial=existing, unit="image", desc="sample")
    with progress:
        for sampled in results:
            for output in outputs:
                output.write(sampled)
            progress.update(sampled.batch.count)
    return images


def _finish(
    config: SampleConfig,
    info: SampleAbout,
    prompts: Prompts | None,
    outputs: Sequence[Output],
    batches: Sequence[ImageBatch],
    started: float,
    drawn: int,
) -> SampleSummary:
    """Complete the files once all images exist; this call drew ``drawn`` of them."""
    labels = _labels(info, 0, info.num) if prompts is None else _captions(prompts, info.num)
    for output in outputs:
        output.finish(batches, labels)
    seconds = time.perf_counter() - started
    summary = SampleSummary(
        images=info.num,
        npz=config.npz,
        folder=config.folder,
        seconds=seconds,
        images_per_second=drawn / seconds,
        labels=config.labels if prompts is None else "captions",
        resumed=info.num - drawn,
    )
    logger.info(
        "%d images, %d of them from an earlier run; %.2f images/s",
        summary.images,
        summary.resumed,
        summary.images_per_second,
    )
    return summary


def _labels(info: SampleAbout, first: int, count: int) -> list[int]:
    """Classes of images; none where they have captions, which workers know by their numbers."""
    if info.text is not None:
        return []
    return choose_labels(info.labels, info.classes, info.sampler.seed, first, count)


def _captions(prompts: Prompts, count: int) -> list[str]:
    parts = (range(first, min(first + CAPTIONS, count)) for first in range(0, count, CAPTIONS))
    return [text for part in parts for text in prompts.texts(part)]
