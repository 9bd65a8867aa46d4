"""Draw images from a trained checkpoint: a grid, or many single images for an evaluation.

python jobs/sample.py --checkpoint runs/demo --classes 1,2,3 --png samples.png
python jobs/sample.py --checkpoint FILE.pt --model SiT-XL/2 --classes 207,360 --png samples.png
python jobs/sample.py --checkpoint runs/demo --num 50000 --labels balanced --npz samples.npz
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli.command import run_command
from pipeline.cli.config_files import read_yaml
from pipeline.cli.next_step import log_next, without_options
from pipeline.cli.options import parse_options
from pipeline.storage.redaction import redact
from pipeline.text import describe_hours
from schemas.errors import UserError
from schemas.sample import SampleConfig

logger = logging.getLogger("jobs.sample")

FIRST = (
    *("checkpoint", "png", "classes", "per_class", "num", "npz", "folder", "labels", "weights"),
    *("sampler.method", "sampler.steps", "sampler.guidance", "sampler.guidance_high"),
    *("sampler.seed", "autoencoder", "json"),
)
"""Options of the short help."""
MAX_SECONDS = 36_000
"""Seconds that 50,000 images may take where their number is proposed."""


def main(argv: list[str]) -> int:
    config = parse_options(
        SampleConfig,
        argv,
        command="python jobs/sample.py",
        about="Draw from a trained checkpoint: with --png a grid, one row for each class; with "
        "--num single images, by workers of a Ray cluster.",
        first=FIRST,
    )
    from pipeline.sampling.options import check_options

    check_options(config)
    logger.info("drawing from '%s'", redact(str(config.checkpoint)))
    with redirect_stdout(sys.stderr):  # Ray's workers and other libraries may print
        summary: Any
        if config.num is None:
            from pipeline.sampling.grid import draw_grid  # torch takes seconds to import

            summary = draw_grid(config)
        else:
            from pipeline.sampling.job import sample_many

            summary = sample_many(config)
    print(json.dumps(asdict(summary)) if config.as_json else "\n".join(summary.files))
    if config.num is None:
        same = without_options(argv, {"png", "classes", "per_class", "json"})
        if any(word.partition("=")[0] == "--config" for word in argv):  # it may name the grid
            same += ["--png", "none"]
        each = summary.seconds / summary.images
        number = 50_000 if 50_000 * each < MAX_SECONDS else 1_000
        many = ("--num", str(number), "--npz", "samples.npz")
        time = describe_hours(number * each / 3600, 2)
        log_next(f"images for a Fréchet distance in {time}", "jobs/sample.py", *same, *many)
    else:
        files = ("--samples", redact(summary.files[0]))
        log_next("their Fréchet distance", "jobs/evaluate.py", *files, *_reference(config))
    return 0


def _reference(config: SampleConfig) -> tuple[str, ...]:
    """Options of the evaluation: the store of the local run that drew the images, and the run."""
    folder = Path(config.checkpoint or "").expanduser()
    for run in (folder, folder.parent):
        with suppress(UserError):
            store = read_yaml(run / "config.yaml").get("store")
            if isinstance(store, str) and Path(store).is_dir():
                return ("--reference", store, "--record", str(run))
    logger.info("STORE_OR_FILE are real images; those of mixed sizes need --resolution N")
    return ("--reference", "STORE_OR_FILE")


if __name__ == "__main__":
    run_command(main)
