"""The whole pipeline on a small data set: images to shards to a student trained with HASTE.

`make demo` runs this. All parts are real but small: scikit-learn's digits, a teacher self-distilled
on them and an autoencoder trained on them (jobs/pretrain/), Ray actors, Ray Train with 2 workers.
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.cli.command import run_command
from pipeline.cli.config_files import read_yaml
from pipeline.cli.options import parse_options
from schemas.base import Strict
from schemas.extract import PRESETS, ExtractConfig
from schemas.report import ReportConfig
from schemas.run import RunConfig
from schemas.sample import SampleConfig
from schemas.validation import validate

if TYPE_CHECKING:
    from pipeline.extract.job import ExtractionSummary
    from pipeline.store import Store

logger = logging.getLogger("jobs.demo")

RUN = ROOT / "runs" / "demo"
STORE = RUN / "store"
REPORT = RUN / "report.html"


def main(argv: list[str]) -> int:
    about = "Extract, train and sample on scikit-learn's digits. Replaces the folder runs/demo."
    parse_options(Strict, argv, command="python jobs/demo.py", about=about)
    # Ray and torch take seconds to import
    from jobs.train_haste import train_run
    from pipeline.distributed.ray_cluster import ray_cluster
    from pipeline.extract.job import extract
    from pipeline.inspect.summary import describe, summarise
    from pipeline.report.page import write_report

    shutil.rmtree(RUN, ignore_errors=True)
    config = _run_config()
    with ray_cluster(None):
        logger.info("1/3  extraction: teacher and autoencoder encode every image once")
        options = {"dataset": "demo", "store": str(STORE), **PRESETS["demo"]}
        extraction = extract(validate(ExtractConfig, options, where="the demo's extraction"))
        logger.info("2/3  training of a small SiT: aligned first, then without the teacher")
        trained = train_run(config)
    logger.info("3/3  images and report")
    images = _draw_images(config, extraction.store, trained)
    write_report(ReportConfig(runs=(str(RUN),), html=str(REPORT)))
    print(describe(extraction.store, summarise(extraction.store)), "", sep="\n")
    print(_result(extraction, trained, images))
    return 0


def _run_config() -> RunConfig:
    values = read_yaml(ROOT / "jobs" / "configs" / "demo.yaml")
    values |= {"store": str(STORE), "output": str(RUN.parent)}
    return validate(RunConfig, values, where="jobs/configs/demo.yaml")


def _draw_images(config: RunConfig, store: Store, trained: dict[str, Any]) -> list[Path]:
    """Samples, loss curves, and attention at the termination and at the end of the training."""
    from pipeline.checkpoints.student import load_student
    from pipeline.report.plots import draw_curves
    from pipeline.runs.reader import ATTENTION, SAMPLES, read_run
    from pipeline.sampling.grid import draw_grid
    from pipeline.visualization.attention import draw_attention
    from pipeline.visualization.store_sample import first_of_each_class

    grid, curves, attention = RUN / "samples.png", RUN / "losses.png", RUN / "attention.png"
    sampling = {
        "checkpoint": str(RUN),
        "classes": tuple(range(10)),
        "png": str(grid),
        "batch_size": 80,
        "sampler": {"steps": 50, "guidance": 2.0},
    }
    draw_grid(SampleConfig.model_validate(sampling))
    draw_curves(read_run(str(RUN)), curves)
    terminated, end = trained["termination_step"], trained["steps"]
    students = {
        f"student at step {terminated}": load_student(RUN / f"checkpoint-{terminated:09d}")[0],
        f"student at step {end}": load_student(RUN)[0],
    }
    draw_attention(store, students, config.alignment, first_of_each_class(store, 4), attention)
    for image, folder in ((grid, SAMPLES), (attention, ATTENTION)):  # where a report finds them
        (RUN / folder).mkdir(exist_ok=True)
        shutil.copyfile(image, RUN / folder / f"step-{end:09d}.png")
    return [grid, curves, attention]


def _result(extraction: ExtractionSummary, trained: dict[str, Any], images: list[Path]) -> str:
    speed = trained["steps_per_second"]
    return "\n".join(
        [
            f"extraction: {extraction.images_per_second:.0f} images/s",
            f"training: {trained['steps']} steps; {speed['phase1']:.2f} steps/s until the "
            f"termination at step {trained['termination_step']}, {speed['phase2']:.2f} after it",
            *(
                f"bytes read of stream {stream}: {count['before']:,} before the termination, "
                f"{count['after']:,} after it"
                for stream, count in trained["bytes_read"].items()
            ),
            f"images: {', '.join(str(image.relative_to(ROOT)) for image in images)}",
            f"report: {REPORT.relative_to(ROOT)}",
        ]
    )


if __name__ == "__main__":
    run_command(main)
