"""Train the demo's teacher: a small vision transformer of DINOv2's architecture, self-distilled.

python jobs/pretrain/self_distill.py [--steps N] [--out FILE]
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

from pipeline.assets import DEMO_TEACHER
from pipeline.cli.command import run_command
from pipeline.cli.next_step import log_next
from pipeline.cli.options import parse_options
from pipeline.pretrain.options import SelfDistillConfig

logger = logging.getLogger("jobs.pretrain")


class CommandOptions(SelfDistillConfig):
    """The configuration and the options of the command."""

    out: str | None = None
    """File of the weights (default: the demo's teacher in pipeline/assets/)."""
    threads: Annotated[int, Field(gt=0)] = 2
    """CPU threads of torch."""


def main(argv: list[str]) -> int:
    config = parse_options(
        CommandOptions,
        argv,
        command="python jobs/pretrain/self_distill.py",
        about="Self-distil the demo's teacher on scikit-learn's digits.",
    )
    logger.info("self-distillation, %d steps", config.steps)
    # torch and timm take seconds to import
    import torch

    from pipeline.datasets.digits import digits_images
    from pipeline.pretrain.self_distillation import knn_accuracies, save_teacher, self_distill

    torch.set_num_threads(config.threads)
    digits, digit_labels = digits_images(config.backbone.img_size)
    images, labels = torch.from_numpy(digits).permute(0, 3, 1, 2), torch.from_numpy(digit_labels)
    backbone = self_distill(images, config)
    knn = knn_accuracies(backbone, images, labels)
    path = Path(config.out or DEMO_TEACHER)
    save_teacher(backbone, path, config, knn)
    parameters = sum(p.numel() for p in backbone.parameters())
    print(f"{parameters:,} parameters, saved to {path}")
    for name, value in knn.items():
        print(f"k-NN accuracy, {name}: {value:.4f}")
    options = ("--dataset", "demo", "--store", "runs/store", "--teacher.weights", str(path))
    log_next("an extraction with it", "pipeline.extract", *options)
    return 0


if __name__ == "__main__":
    run_command(main)
