"""Train the demo's autoencoder: a tiny KL autoencoder in the format of diffusers.

python jobs/pretrain/autoencoder.py [--steps N] [--out DIRECTORY]
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

if not __package__:  # run as a file: Python then searches this folder, not the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import jobs  # noqa: F401  (reports packages that are not installed)

from pydantic import Field

from pipeline.assets import DEMO_AUTOENCODER
from pipeline.cli.command import run_command
from pipeline.cli.next_step import log_next
from pipeline.cli.options import parse_options
from pipeline.pretrain.options import AutoencoderConfig

logger = logging.getLogger("jobs.pretrain")


class CommandOptions(AutoencoderConfig):
    """The configuration and the options of the command."""

    out: str | None = None
    """Folder of the autoencoder (default: the demo's in pipeline/assets/)."""
    resolution: Annotated[int, Field(gt=0)] = 32
    """Pixels per side of the images."""
    threads: Annotated[int, Field(gt=0)] = 2
    """CPU threads of torch."""


def main(argv: list[str]) -> int:
    config = parse_options(
        CommandOptions,
        argv,
        command="python jobs/pretrain/autoencoder.py",
        about="Train the demo's autoencoder on scikit-learn's digits.",
    )
    logger.info("training of the autoencoder, %d steps", config.steps)
    # torch and diffusers take seconds to import
    import torch

    from pipeline.datasets.digits import digits_images
    from pipeline.pretrain.kl_autoencoder import train_autoencoder

    torch.set_num_threads(config.threads)
    digits, _ = digits_images(config.resolution)
    model, report = train_autoencoder(torch.from_numpy(digits).permute(0, 3, 1, 2), config)
    path = Path(config.out or DEMO_AUTOENCODER)
    model.save_pretrained(path)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, saved to {path}")
    print(report.model_dump_json(indent=2))
    options = ("--dataset", "demo", "--store", "runs/store", "--autoencoder", str(path))
    log_next("an extraction with it", "pipeline.extract", *options)
    return 0


if __name__ == "__main__":
    run_command(main)
