"""The experiment of ``matrix.py``: its artifacts, and a run of every arm with every seed.

Teacher and autoencoder are trained on the training images without labels, or are the demo's; the
judge on the same images with labels, apart from both. Then every arm trains on one store, with
equal steps and seeds, in plain processes without a cluster, and is measured at every checkpoint.
With --select and --seeds several commands share the runs once the artifacts are made.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import signal
import time
from collections import deque
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from jobs.experiments.artifacts import (
    ArtifactCache,
    collect,
    complete_store,
    make_autoencoder,
    make_classifier,
    make_teacher,
    read_images,
)
from jobs.experiments.judge import Judge, Verdicts, nearest_accuracy
from jobs.experiments.options import MatrixConfig, check_options
from jobs.experiments.results import read_run_numbers, write_results
from pipeline.checkpoints.selection import checkpoint_name, steps_of
from pipeline.cli.config_files import merge
from pipeline.cli.log_setup import set_up_logging
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import StopSignals
from pipeline.precision import choose_device
from pipeline.runs.directory import METRICS, SUMMARY
from pipeline.storage.locks import exclusive_lock
from pipeline.store import Store, StreamReader
from pipeline.targets.class_token import read_class_tokens
from pipeline.train.local import train_here
from schemas.errors import StoppedError, UserError, plain_text
from schemas.extract import PRESETS, ExtractConfig
from schemas.run import RunConfig
from schemas.validation import validate

logger = logging.getLogger("jobs.experiments")

SAME = ("steps", "global_batch", "checkpoint", "samples", "validation", "ema_decay")
"""Options that are equal in all arms, because steps and measurements are compared."""
POLL_SECONDS = 0.5


class Job(NamedTuple):
    """One run."""

    arm: str
    seed: int
    run: RunConfig

    @property
    def name(self) -> str:
        return self.run.name


def run_matrix(config: MatrixConfig) -> tuple[Path, list[str]]:
    """Make the missing artifacts and train the missing runs. Returns the path of the table and the
    names of runs that failed. Raises ``UserError``."""
    check_options(config)
    _check(config)
    device = choose_device(config.device)
    store, facts = _make_artifacts(config, device)
    jobs = [_job(config, store.url, arm, seed) for seed in config.seeds for arm in config.arms]
    chosen = [job for job in jobs if not config.select or job.arm in config.select]
    if config.processes > 1 and device == "cpu":
        _train_in_processes(config, chosen)
    else:
        judge = _judge(config, device)
        for job in chosen:
            _train(config, job, judge, device)
    _draw_conclusions(config, jobs, facts)
    failed = [job.name for job in chosen if _failure(config, job) is not None]
    for name in failed:
        logger.error("run %s failed; the same command tries again", name)
    return config.folder / "table.md", failed


def _check(config: MatrixConfig) -> None:
    """Validate all options before hours of training. Raises ``UserError``."""
    for name in (None, *config.streams):
        _extraction(config, "train", name)
    jobs = {arm: _job(config, "-", arm, 0) for arm in config.arms}
    first = next(iter(jobs.values())).run
    if first.validation.every is None:
        raise UserError("run.validation.every is missing: the steps between validation losses")
    for arm, job in jobs.items():
        for key in SAME:
            if getattr(job.run, key) != getattr(first, key):
                raise UserError(
                    f"the arm '{arm}' has another {key} than '{first.name.rpartition('-')[0]}': "
                    "arms that are trained or measured at different steps cannot be compared"
                )


def _make_artifacts(config: MatrixConfig, device: str) -> tuple[Store, dict[str, Any]]:
    """The store that all runs share, and the facts of the results: measurements of the artifacts
    and the settings."""
    cache, folder = ArtifactCache(config.folder), config.folder
    common = {"held_out": config.held_out, "resolution": config.resolution}
    _, counts = cache.get(
        "images",
        common,
        lambda folder: collect(str(config.source), config.held_out, config.resolution, folder),
    )
    train, held_out = _images(config, "train"), _images(config, "held_out")
    facts: dict[str, Any] = {
        "source": Path(str(config.source)).name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "images": {**counts, "train": len(train.labels), "held_out": len(held_out.labels)},
        "teacher": "demo" if config.demo_networks else "self-distilled on the training images",
    }
    if not config.demo_networks:
        cache.get(
            "teacher",
            common | config.teacher.model_dump(mode="json"),
            lambda folder: make_teacher(folder, train, config.teacher, device),
        )
        _, facts["autoencoder"] = cache.get(
            "autoencoder",
            common | config.autoencoder.model_dump(mode="json"),
            lambda folder: make_autoencoder(folder, train, config.autoencoder, device),
        )
    cache.get(
        "judge",
        common | config.judge.model_dump(mode="json"),
        lambda folder: make_classifier(folder, train, held_out, config.judge, device),
    )
    logger.info("extracting the stores")
    stores = {}
    for split in ("train", "held_out"):
        for name in (None, *config.streams):
            extraction = _extraction(config, split, name)
            stores[split] = complete_store(cache, extraction, device, config.threads)

    def measure(_: Path) -> dict[str, Any]:
        """Measurements of real held-out images, and of the teachers."""
        return {
            "real_images": _judge(config, device).measure(held_out),
            "nearest_neighbours": _nearest_neighbours(stores["train"], stores["held_out"]),
        }

    identity = {
        **common,
        "judge": config.judge.model_dump(mode="json"),
        "neighbours": config.measure.neighbours,
        "streams": config.streams,
    }
    _, measured = cache.get("measured", identity, measure)
    settings = {
        "run": config.run,
        "measure": config.measure.model_dump(mode="json"),
        "streams": config.streams,
        "arms": config.arms,
    }
    return Store.open(str(folder / "store_train")), {**facts, **measured, "settings": settings}


def _nearest_neighbours(train: Store, held_out: Store) -> dict[str, float]:
    """Accuracy of the class tokens of each teacher on held-out images, by its class stream."""
    found = {}
    for name in train.manifest.class_streams:
        sets = []
        for store in (train, held_out):
            counts = store.index().samples_per_shard
            shards = np.repeat(np.arange(len(counts)), counts)
            rows = np.concatenate([np.arange(count) for count in counts])
            labels = _labels(store, shards, rows)
            sets += [read_class_tokens(store, shards, rows, name), labels]
        found[name] = nearest_accuracy(*sets)
    return found


def _labels(store: Store, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
    read = StreamReader(store, "latents", columns=["label"]).read(shards, rows)
    labels: np.ndarray = read["label"]
    return labels


def _images(config: MatrixConfig, split: str) -> Any:
    return read_images(config.folder / "images" / split, config.resolution)


def _judge(config: MatrixConfig, device: str) -> Judge:
    return Judge(
        config.folder / "judge", config.judge, config.measure, _images(config, "train"), device
    )


def _extraction(config: MatrixConfig, split: str, stream: str | None) -> ExtractConfig:
    """Options of the extraction of one part of the images; ``stream``: a further teacher's."""
    folder, backbone = config.folder, config.teacher.backbone
    if config.demo_networks:
        values: dict[str, Any] = dict(PRESETS["demo"])
    else:
        sizes = backbone.model_dump(exclude={"name", "img_size", "init_values"})
        values = {
            "cut": "activations",
            "autoencoder": str(folder / "autoencoder"),
            "teacher": {
                "model": backbone.name,
                "weights": str(folder / "teacher" / "teacher.safetensors"),
                "image_size": backbone.img_size,
                "model_args": sizes,
            },
        }
    own = {
        "dataset": "folder",
        "source": str(folder / "images" / split),
        "store": str(folder / f"store_{split}"),
        "resolution": config.resolution,
        "precision": "float32",
    }
    values = merge(merge(values, own), config.store)
    if stream is not None:
        values = merge(values, config.streams[stream] | {"add_stream": stream})
    where = "the table 'store'" if stream is None else f"the stream '{stream}'"
    return validate(ExtractConfig, values, where=where)


def _job(config: MatrixConfig, store: str, arm: str, seed: int) -> Job:
    values = merge(config.run, config.arms[arm])
    own: dict[str, Any] = {
        "name": f"{arm}-seed{seed}",
        "seed": seed,
        "output": str(config.folder / "runs"),
        "store": store,
    }
    if (values.get("validation") or {}).get("every") is not None:
        own["validation"] = {"store": str(config.folder / "store_held_out")}
    return Job(arm, seed, validate(RunConfig, merge(values, own), where=f"the arm '{arm}'"))


def _train_in_processes(config: MatrixConfig, jobs: list[Job]) -> None:
    """Train runs that are not finished, ``config.processes`` at a time. Each has a process of its
    own, so that one that crashes ends nothing else. Raises ``StoppedError`` after SIGTERM or
    Ctrl-C, once all have written a checkpoint."""
    context = multiprocessing.get_context("spawn")
    waiting = deque(job for job in jobs if not _is_finished(config, job))
    active: dict[str, tuple[Job, BaseProcess]] = {}
    with StopSignals() as signals:
        while waiting or active:
            while waiting and len(active) < config.processes:
                job = waiting.popleft()
                _failed(config, job).unlink(missing_ok=True)
                process = context.Process(target=_train_alone, args=(config, job), name=job.name)
                _start_without_interrupts(process)
                active[job.name] = job, process
                logger.info("run %s began, %d are waiting", job.name, len(waiting))
            time.sleep(POLL_SECONDS)
            if signals.received is not None:
                for _, process in active.values():
                    process.terminate()
                for _, process in active.values():
                    process.join()
                raise StoppedError(
                    "the experiment was stopped; run the same command again to continue",
                    signals.exit_code,
                )
            for name, (job, process) in list(active.items()):
                if process.exitcode is None:
                    continue
                del active[name]
                logger.info("run %s ended", name)
                if process.exitcode and _failure(config, job) is None:
                    _note_failure(config, job, f"its process ended with code {process.exitcode}")


def _start_without_interrupts(process: BaseProcess) -> None:
    """Start a process that a terminal's Ctrl-C does not reach: this process sends it SIGTERM, which
    does not break off its imports with a traceback."""
    resource_tracker.ensure_running()  # else it is started with the process, and unblocks signals
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _train_alone(config: MatrixConfig, job: Job) -> None:
    """The main function of a run's own process."""
    set_up_logging("warning")
    torch.set_num_threads(1)
    try:
        _train(config, job, _judge(config, "cpu"), "cpu")
    except StoppedError as stop:
        raise SystemExit(stop.code) from None
    except UserError as error:  # another command trains this run
        _note_failure(config, job, str(error))
        raise SystemExit(1) from None


def _train(config: MatrixConfig, job: Job, judge: Judge, device: str) -> None:
    """Train and judge one run. An error of the run is noted and not raised, so that the others are
    trained. Raises ``UserError`` where another command trains it, and ``StoppedError``."""
    if _is_finished(config, job):
        return
    logger.info("run %s", job.name)
    what = f"the run '{job.name}' in --output '{config.folder}'"
    remedy = "share the runs by --select and --seeds"
    with exclusive_lock(config.folder / "running" / job.name, what=what, remedy=remedy):
        try:
            _train_and_judge(config, job, judge, device)
            _failed(config, job).unlink(missing_ok=True)  # of an earlier attempt
        except StoppedError:
            raise
        except Exception as error:  # any, because no run may hide behind another
            logger.exception("run %s failed", job.name)
            _note_failure(config, job, str(error) or type(error).__name__)


def _train_and_judge(config: MatrixConfig, job: Job, judge: Judge, device: str) -> None:
    assert job.run.store is not None
    folder, store = config.folder / "runs" / job.name, Store.open(job.run.store)
    verdicts = Verdicts(_verdicts(config, job), judge.identity)

    def judged(checkpoint: Path) -> None:
        (step,) = steps_of([checkpoint.name])
        if step in _judged_steps(job.run) and step not in verdicts.rows:
            verdicts.add(step, judge.measure(judge.sample(checkpoint, store)))

    existing = steps_of(path.name for path in folder.glob("*")) if folder.is_dir() else []
    for step in existing:
        judged(folder / checkpoint_name(step))
    missed = [
        s for s in _judged_steps(job.run) if s not in verdicts.rows and s < max([0, *existing])
    ]
    if missed:
        raise UserError(
            f"it was trained beyond step {missed[0]}, which was not measured in this way: delete "
            f"'{folder}' to train it again"
        )
    group = ProcessGroup(device=torch.device(device))
    train_here(job.run, folder, group, on_checkpoint=judged)


def _judged_steps(run: RunConfig) -> list[int]:
    every = run.checkpoint.every
    return sorted({*range(every, run.steps + 1, every), run.steps})


def _is_finished(config: MatrixConfig, job: Job) -> bool:
    try:
        summary = json.loads((config.folder / "runs" / job.name / SUMMARY).read_text())
        rows = json.loads(_verdicts(config, job).read_text())["rows"]
        done = {int(step) for step in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return summary.get("steps") == job.run.steps and done >= set(_judged_steps(job.run))


def _verdicts(config: MatrixConfig, job: Job) -> Path:
    return config.folder / "judged" / f"{job.name}.json"


def _failed(config: MatrixConfig, job: Job) -> Path:
    return config.folder / "failed" / f"{job.name}.json"


def _note_failure(config: MatrixConfig, job: Job, reason: str) -> None:
    path = _failed(config, job)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"reason": plain_text(reason)[:300]}) + "\n")


def _failure(config: MatrixConfig, job: Job) -> str | None:
    try:
        return str(json.loads(_failed(config, job).read_text())["reason"])
    except FileNotFoundError:
        return None


def _draw_conclusions(config: MatrixConfig, jobs: list[Job], facts: dict[str, Any]) -> None:
    numbers = []
    for job in jobs:
        run = config.folder / "runs" / job.name
        row = {"arm": job.arm, "seed": job.seed, "failed": _failure(config, job)}
        numbers.append({**row, **read_run_numbers(run, _verdicts(config, job))})
    results = {
        "facts": facts,
        "steps": jobs[0].run.steps,
        "pairs": config.pairs,
        "runs": numbers,
    }
    folders = [config.folder / "runs" / job.name for job in jobs]
    write_results(config.folder, results, [run for run in folders if (run / METRICS).exists()])
