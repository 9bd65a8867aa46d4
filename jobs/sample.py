"""Draw images from a trained checkpoint: a grid, or many single images for an evaluation.

python jobs/sample.py --checkpoint runs/demo --classes 1,2,3 --png samples.png
python jobs/sample.py --checkpoint FILE.pt --model SiT-XL/2 --classes 207,360 --png samples.png
python jobs/sample.py --checkpoint runs/demo --num 50000 --labels balanced --npz samples.npz
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli.command import run_command
from pipeline.cli.options import parse_options
from pipeline.storage.redaction import redact
from schemas.sample import SampleConfig

logger = logging.getLogger("jobs.sample")

FIRST = (
    *("checkpoint", "png", "classes", "per_class", "num", "npz", "folder", "labels", "weights"),
    *("sampler.method", "sampler.steps", "sampler.guidance", "sampler.guidance_high"),
    *("sampler.seed", "autoencoder", "json"),
)
"""Options of the short help."""


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
        logger.info(
            "next, for a Fréchet distance: the same with --num 50000 --npz samples.npz instead of "
            "--png, then python jobs/evaluate.py --samples samples.npz --reference STORE_OR_FILE"
        )
    else:
        logger.info(
            "next: python jobs/evaluate.py --samples %s --reference STORE_OR_FILE (--resolution N "
            "where the reference is a folder of images of mixed sizes)",
            shlex.quote(redact(summary.files[0])),
        )
    return 0


if __name__ == "__main__":
    run_command(main)
