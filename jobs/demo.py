"""The whole pipeline on a small data set: images to shards to a student that let its teacher go.

`make demo` runs this. Everything is real but small: scikit-learn's digits, a teacher self-distilled
on them and an autoencoder trained on them (jobs/pretrain/), Ray actors, Ray Train with 2 workers.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from jobs.train_haste import train_run
from pipeline.checkpoints.student import load_student
from pipeline.cli.command import run_command
from pipeline.cli.config_files import read_yaml
from pipeline.distributed.ray_cluster import ray_cluster
from pipeline.extract.job import extract
from pipeline.inspect.summary import describe, summarise
from pipeline.report.page import write_report
from pipeline.report.plots import draw_curves
from pipeline.runs.reader import ATTENTION, SAMPLES, read_run
from pipeline.sampling.grid import draw_grid
from pipeline.store import Store, StreamReader
from pipeline.visualization.attention import draw_attention
from schemas.extract import PRESETS, ExtractConfig
from schemas.report import ReportConfig
from schemas.run import RunConfig
from schemas.sample import SampleConfig
from schemas.validation import validate

RUN = ROOT / "runs" / "demo"


def main(argv: list[str]) -> int:
    shutil.rmtree(RUN, ignore_errors=True)
    store_path = RUN / "store"
    options = {"dataset": "demo", "store": str(store_path), **PRESETS["demo"]}
    values = read_yaml(ROOT / "jobs" / "configs" / "demo.yaml")
    values |= {"store": str(store_path), "output": str(RUN.parent)}
    config = validate(RunConfig, values, where="jobs/configs/demo.yaml")
    with ray_cluster(None):
        _say("1/3  the teacher and the autoencoder look at every image once")
        extraction = extract(validate(ExtractConfig, options, where="the demo's extraction"))
        _say("2/3  a small SiT trains, aligned at first, then alone")
        trained = train_run(config)
    _say("3/3  pictures")
    pictures = _draw(config, extraction.store, trained)
    summary = {
        "images": extraction.images,
        "extraction_images_per_second": extraction.images_per_second,
        **{key: trained[key] for key in ("steps", "termination_step", "steps_per_second")},
        "bytes_read": trained["bytes_read"],
        "pictures": [str(picture.relative_to(ROOT)) for picture in pictures],
    }
    page = RUN / "report.html"
    summary["report"] = str(page.relative_to(ROOT))
    (RUN / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_report(ReportConfig(runs=(str(RUN),), html=str(page)))
    _report(extraction.store, summary)
    return 0


def _draw(config: RunConfig, store: Store, trained: dict[str, Any]) -> list[Path]:
    grid, curves, attention = (
        RUN / name for name in ("samples.png", "losses.png", "attention.png")
    )
    draw_grid(
        SampleConfig.model_validate(
            {
                "checkpoint": str(RUN),
                "classes": tuple(range(10)),
                "png": str(grid),
                "batch_size": 80,
                "sampler": {"steps": 50, "guidance": 2.0},
            }
        )
    )
    step = trained["termination_step"]
    draw_curves(read_run(str(RUN)), curves)
    students = {
        f"student at step {step}": load_student(RUN / f"checkpoint-{step:09d}")[0],
        f"student at step {trained['steps']}": load_student(RUN)[0],
    }
    draw_attention(store, students, config.alignment, _one_of_each_class(store, 4), attention)
    for picture, folder in ((grid, SAMPLES), (attention, ATTENTION)):
        _keep(picture, folder, trained["steps"])
    return [grid, curves, attention]


def _keep(picture: Path, folder: str, step: int) -> None:
    """Where a report looks for it, unless the run has drawn one itself."""
    path = RUN / folder / f"step-{step:09d}.png"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(picture, path)


def _one_of_each_class(store: Store, count: int) -> list[int]:
    """Rows of shard 0 with the first sample of each of the first ``count`` classes met there."""
    rows = np.arange(store.record(0).samples)
    labels = StreamReader(store, "latents").read(np.zeros_like(rows), rows)["label"]
    return sorted(np.unique(labels, return_index=True)[1].tolist())[:count]


def _report(store: Store, summary: dict[str, Any]) -> None:
    rates = summary["steps_per_second"]
    lines = ["", describe(store, summarise(store)), ""]
    lines.append(f"extraction: {summary['extraction_images_per_second']:.0f} images/s")
    lines.append(
        f"training: {summary['steps']} steps; {rates['phase1']:.2f} steps/s until the alignment "
        f"ended at step {summary['termination_step']}, {rates['phase2']:.2f} steps/s after it"
    )
    for stream, count in summary["bytes_read"].items():
        lines.append(
            f"bytes read of stream {stream}: {count['before']:,} before the termination, "
            f"{count['after']:,} after it"
        )
    lines.append(f"pictures: {', '.join(summary['pictures'])}")
    lines.append(f"report: {summary['report']}")
    print("\n".join(lines))


def _say(message: str) -> None:
    print(f"\n== {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
