"""Train a diffusion transformer on a store: the job that `ray job submit` runs.

    python jobs/train_haste.py --config jobs/configs/sit_xl2_haste.yaml --store URL

Every option of the config can be overridden, for example --steps 1000 --alignment.feature-weight 0.
With --plan, only print the estimated cost of every cut for this run (--plan --help).
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli.command import run_command
from pipeline.cli.next_step import log_next
from pipeline.cli.options import parse_options
from pipeline.cost_estimate import wants_plan
from pipeline.storage.redaction import redact
from schemas.errors import UserError
from schemas.run import RunConfig

if TYPE_CHECKING:
    from pipeline.runs.directory import RunFolder
    from pipeline.store import Store

logger = logging.getLogger("jobs.train_haste")

ABOUT = """\
Train a diffusion transformer with HASTE on a store that pipeline.extract made. The same command
resumes an interrupted run. --plan prints the cost of every cut of the teacher for this run instead;
--plan --help lists its options."""

FIRST = (
    *("store", "name", "output", "steps", "global_batch", "student.model", "student.latent_size"),
    *("student.num_classes", "alignment.feature_depth", "alignment.student_layers"),
    *("alignment.teacher_layers", "alignment.termination.step", "optimizer.learning_rate"),
    *("workers.count", "workers.micro_batch", "checkpoint.every", "checkpoint.keep"),
    *("samples.every", "ray_address"),
)
"""Options of the short help."""


def main(argv: list[str]) -> int:
    if wants_plan(argv):
        from pipeline.cost_estimate.command import plan_training

        return plan_training(argv)
    config = parse_options(
        RunConfig,
        argv,
        command="python jobs/train_haste.py",
        about=ABOUT,
        first=FIRST,
    )
    from pipeline.text import rounded

    print(json.dumps(rounded(train_run(config)), indent=1))
    run = redact(f"{config.output.rstrip('/')}/{config.name}")
    captions = ["--store", redact(str(config.store))] if config.student.family == "MMDiT" else []
    if config.diffusion.text_stream is not None:  # of several in the store
        captions += ["--text.stream", config.diffusion.text_stream]
    log_next("pictures", "jobs/sample.py", "--checkpoint", run, "--png", "samples.png", *captions)
    what = "curves and samples" if config.samples.every else "curves"
    log_next(f"{what} on a page", "pipeline.report", run, "--html", "report.html")
    return 0


def for_workers(config: RunConfig) -> RunConfig:
    """The config with absolute local paths, because Ray workers run in another folder."""
    from pipeline.storage.filesystem import with_absolute_paths

    return with_absolute_paths(
        config,
        [
            *("store", "output", "data.cache_dir", "validation.store"),
            *("samples.evaluate.reference", "samples.captions", "samples.store"),
        ],
        folders=["samples.autoencoder"],
        weights=["samples.evaluate.network_weights", "samples.evaluate.inception_weights"],
    )


def train_run(config: RunConfig) -> dict[str, Any]:
    """Check what can be checked without workers, then train. Returns the run's summary."""
    if config.store is None:
        raise UserError("--store is missing: the folder or URL of the store to train on")
    from pipeline.runs.directory import RunFolder
    from pipeline.store import Store

    config = for_workers(config)
    store = Store.open(config.store)
    logger.info("run '%s' on %s", config.name, store.shown_url)
    run = RunFolder(config)
    _, summary = _resolve(config, run, store)
    if not summary:
        with run.lock():
            # again, because another command may have trained the run until now
            config, summary = _resolve(config, run, store)
            if not summary:
                from pipeline.distributed.ray_cluster import ray_cluster
                from pipeline.train.ray_trainer import fit

                with ray_cluster(config.ray_address):
                    fit(config)
    return summary or run.summary()


def _resolve(
    config: RunConfig, run: RunFolder, store: Store
) -> tuple[RunConfig, dict[str, Any] | None]:
    """The config as workers take it, and the summary if the run has its steps. Raises
    ``UserError``."""
    from pipeline.checkpoints.selection import latest_state
    from pipeline.runs.compatibility import resolve_run  # torch takes seconds to import

    state = latest_state(run.checkpoints)
    where = None if state is None else run.checkpoints.where(state.step)
    config = resolve_run(config, store.manifest, state, where)
    streams = ["latents"]
    if config.diffusion.class_stream is not None:  # read in both phases
        streams.append(config.diffusion.class_stream)
    if state is None or state.termination is None:
        streams += [str(options.stream) for options in config.alignment.streams]
    store.require_complete(*streams)
    if state is not None:
        done = run.summary() if state.step >= config.steps and run.has_summary else {}
        if done.get("steps", 0) >= config.steps:  # else it is of a shorter run
            logger.info("run '%s' already has its %d steps", config.name, state.step)
            return config, done
    return config, None


if __name__ == "__main__":
    run_command(main)
