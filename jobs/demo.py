"""The whole pipeline on a small data set: images to shards to a student trained with HASTE, or with
another recipe (jobs/configs/demo/RECIPE.yaml) on the same shards.

`make demo` runs this. All parts are real but small: scikit-learn's digits, a teacher self-distilled
on them and an autoencoder trained on them (jobs/pretrain/), Ray actors, Ray Train with 2 workers.
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.cli.command import run_command
from pipeline.cli.config_files import read_yaml
from pipeline.cli.next_step import log_next
from pipeline.cli.options import parse_options
from pipeline.pretrain.options import PROMPTS
from schemas.base import Strict
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig
from schemas.fields import Name
from schemas.report import ReportConfig
from schemas.run import RunConfig
from schemas.sample import SampleConfig
from schemas.validation import validate

if TYPE_CHECKING:
    from pipeline.extract.job import ExtractionSummary
    from pipeline.store import Store

logger = logging.getLogger("jobs.demo")

RUN = ROOT / "runs" / "demo"
"""Folder of the default recipe; those of others have its name before theirs."""
CONFIGS = ROOT / "jobs" / "configs"
HASTE, TEXT = "haste", "text"


class DemoConfig(Strict):
    """The demo."""

    task: Literal["class", "text"] = "class"
    """Condition of the pictures: 'class', or 'text', captions made of the digits' names ("a
    handwritten seven"), which an MM-DiT reads (needs the extra 'text'; writes runs/demo_text)."""
    recipe: Name = HASTE
    """Recipe of the training: haste, or the NAME of a file jobs/configs/demo/NAME.yaml (irepa,
    repa, reg, reg_haste). Others than haste use the shards in runs/demo and are written to
    runs/demo_NAME; their report compares them with the recipes that were run before."""


def main(argv: list[str]) -> int:
    about = "Extract, train and sample on scikit-learn's digits. Replaces the folder of the recipe."
    chosen = parse_options(DemoConfig, argv, command="python jobs/demo.py", about=about)
    recipe = chosen.recipe
    if chosen.task == "text":
        if recipe != HASTE:
            raise UserError(f"--recipe {recipe} is for --task class; --task text has HASTE only")
        recipe = TEXT
    config = _run_config(recipe)
    logger.info("the demo takes about 4 minutes on two idle cores")
    # Ray and torch take seconds to import
    from jobs.train_haste import train_run
    from pipeline.distributed.ray_cluster import ray_cluster
    from pipeline.extract.job import extract
    from pipeline.inspect.summary import describe, summarise
    from pipeline.report.page import write_report

    run = RUN.with_name(config.name)
    shutil.rmtree(run, ignore_errors=True)
    text = chosen.task == "text"
    store, page = (run if text else RUN) / "store", run / "report.html"
    options = {"dataset": "demo", "store": str(store), **PRESETS["demo"]}
    if text:
        from jobs.text_demo import prepare

        logger.info("0/3  captions, and a small text encoder of them")
        options = prepare(run)
    config = config.model_copy(update={"store": str(store), "output": str(run.parent)})
    with ray_cluster(None):
        logger.info("1/3  extraction: teacher and autoencoder encode every image once")
        extraction = extract(validate(ExtractConfig, options, where="the demo's extraction"))
        logger.info(
            "2/3  training of a small %s: aligned first, then without the teacher",
            config.student.family,
        )
        trained = train_run(config)
    logger.info("3/3  images and report")
    images = _draw_images(run, config, extraction.store, trained)
    found = (path.parent for path in RUN.parent.glob(f"{RUN.name}*/summary.json"))
    earlier = sorted(str(path) for path in found if not path.name.endswith(f"_{TEXT}"))
    runs = [str(run)] if recipe in (HASTE, TEXT) else earlier
    write_report(ReportConfig(runs=tuple(runs), html=str(page)))
    print(describe(extraction.store, summarise(extraction.store)), "", sep="\n")
    print(_result(extraction, trained, [*images, page]))
    if text:
        from jobs.text_demo import measure_agreement

        agreement, pictures = measure_agreement(run)
        print(f"agreement: {agreement:.0%} of {pictures} pictures are of their caption's digit")
    sys.stdout.flush()
    one = ("--caption", "a handwritten seven") if text else ("--classes", "7")
    files = ("--checkpoint", str(run), *one, "--png", str(run / "seven.png"))
    log_next("other pictures", "jobs/sample.py", *files)
    return 0


def _run_config(recipe: str) -> RunConfig:
    """The recipe's file, named as its folder. Raises ``UserError`` for a recipe without a file."""
    name = "demo.yaml" if recipe == HASTE else f"demo/{recipe}.yaml"
    if not (CONFIGS / name).exists():
        others = sorted({path.stem for path in CONFIGS.glob("demo/*.yaml")} - {TEXT})
        raise UserError(f"--recipe {recipe} is not one of {HASTE}, {', '.join(others)}")
    run = RUN.name if recipe == HASTE else f"{RUN.name}_{recipe}"
    options = {**read_yaml(CONFIGS / name), "name": run}
    return validate(RunConfig, options, where=f"jobs/configs/{name}")


def _draw_images(run: Path, config: RunConfig, store: Store, trained: dict[str, Any]) -> list[Path]:
    """Samples, loss curves, and, for a recipe that aligns it, attention at the termination and at
    the end of the training."""
    from pipeline.checkpoints.student import load_student
    from pipeline.report.plots import draw_curves
    from pipeline.runs.reader import ATTENTION, SAMPLES, read_run
    from pipeline.sampling.grid import draw_grid
    from pipeline.visualization.attention import draw_attention
    from pipeline.visualization.store_sample import first_of_each_class

    grid, curves, attention = run / "samples.png", run / "losses.png", run / "attention.png"
    sampling: dict[str, Any] = {
        "checkpoint": str(run),
        "png": str(grid),
        "batch_size": 80,
        "sampler": {"steps": 50, "guidance": 2.0},
    }
    if config.student.family == "MMDiT":
        sampling["caption"] = PROMPTS
    else:
        sampling["classes"] = tuple(range(10))
    draw_grid(SampleConfig.model_validate(sampling))
    draw_curves(read_run(str(run)), curves)
    terminated, end = trained["termination_step"], trained["steps"]
    images, aligned = {SAMPLES: grid}, config.alignment.attended
    if aligned is not None:
        students = {f"student at step {end}": load_student(run)[0]}
        if terminated is not None:
            first = load_student(run / f"checkpoint-{terminated:09d}")[0]
            students = {f"student at step {terminated}": first, **students}
        draw_attention(store, students, aligned, first_of_each_class(store, 4), attention)
        images[ATTENTION] = attention
    for folder, image in images.items():  # where a report finds them
        (run / folder).mkdir(exist_ok=True)
        shutil.copyfile(image, run / folder / f"step-{end:09d}.png")
    return [curves, *images.values()]


def _result(extraction: ExtractionSummary, trained: dict[str, Any], files: list[Path]) -> str:
    steps, ended = trained["steps_per_second"], trained["termination_step"]
    rate = f"{steps['phase1']:.2f} steps/s"
    if ended is not None:
        rate += f" until the termination at step {ended}, {steps['phase2']:.2f} after it"
    images = extraction.images
    speed = f"{extraction.images_per_second:.0f} images/s" if images else "the shards were there"
    read = [
        f"bytes read of stream {stream}: {count['before']:,}"
        + ("" if ended is None else f" before the termination, {count['after']:,} after it")
        for stream, count in trained["bytes_read"].items()
    ]
    return "\n".join(
        [
            f"extraction: {speed}",
            f"training: {trained['steps']} steps; {rate}",
            *read,
            f"images: {', '.join(str(image.relative_to(ROOT)) for image in files[:-1])}",
            f"report: {files[-1].relative_to(ROOT)}",
        ]
    )


if __name__ == "__main__":
    run_command(main)
