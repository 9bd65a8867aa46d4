"""Draw images from a trained checkpoint: a grid to look at, or many to measure.

python jobs/sample.py --checkpoint runs/demo --classes 1,2,3 --png samples.png
python jobs/sample.py --checkpoint FILE.pt --model SiT-XL/2 --classes 207,360 --png samples.png
python jobs/sample.py --checkpoint runs/demo --num 50000 --labels balanced --npz samples.npz
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from tqdm import tqdm

from pipeline.autoencoders import open_decoder
from pipeline.checkpoints.resolve import find_checkpoint, local_copy
from pipeline.checkpoints.student import load_trained_student
from pipeline.cli.command import run_command
from pipeline.cli.options import parse_options
from pipeline.precision import choose_arithmetic
from pipeline.sampling.batches import choose_classes
from pipeline.sampling.generate import draw_images
from pipeline.visualization.image_grid import save_grid
from schemas.errors import UserError
from schemas.sample import SampleConfig

FOR_MANY = ("npz", "folder", "labels", "workers", "ray_address")
"""Options that a grid does not know."""


def main(argv: list[str]) -> int:
    config = parse_options(
        SampleConfig,
        argv,
        command="python jobs/sample.py",
        about="Draw from a trained checkpoint: with --png a grid, one row for each class; with "
        "--num single images, by workers of a Ray cluster.",
    )
    check_request(config)
    with redirect_stdout(sys.stderr):  # where Ray's workers and libraries may say what they like
        result, lines = _grid(config) if config.num is None else _many(config)
    print(json.dumps(result) if config.as_json else "\n".join(lines))
    return 0


def check_request(config: SampleConfig) -> None:
    """Raises ``UserError`` where it does not say clearly what to draw."""
    if config.png is None and config.num is None:
        raise UserError(
            "what is to be drawn? --png FILE for a grid, or --num N with --npz FILE or --folder DIR"
        )
    if config.png is not None and config.num is not None:
        raise UserError("--png draws a grid and --num single images: give one of them")
    if config.num is not None:
        if config.npz is None and config.folder is None:
            raise UserError("--num needs --npz FILE or --folder DIR for its images")
        if config.npz is not None and config.npz.endswith("/"):
            raise UserError(f"--npz '{config.npz}' is a folder's name: name a file")
        if "per_class" in config.model_fields_set:
            raise UserError("--per-class is for --png; with --num, say --labels balanced")
        return
    for key in FOR_MANY:
        if key in config.model_fields_set:
            raise UserError(f"--{key.replace('_', '-')} is for --num, not for the grid of --png")


def draw_grid(config: SampleConfig) -> Path:
    """Write the grid and return its path. Raises ``UserError``."""
    path = _picture(config)
    with local_copy(find_checkpoint(config.checkpoint), config.weights) as checkpoint:
        trained = load_trained_student(checkpoint, config.weights, config.model)
    student = trained.student
    asked = (0,) if config.classes is None else config.classes
    classes = choose_classes(asked, student.config.num_classes)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that torch can use")
    precision = choose_arithmetic(config.precision, device)
    autoencoder = open_decoder(config.autoencoder, trained.encoder)
    student.to(device)
    autoencoder.to(device)
    labels = [label for label in classes for _ in range(config.per_class)]
    images = []
    for start in tqdm(range(0, len(labels), config.batch_size), unit="batch", desc="sample"):
        images.append(
            draw_images(
                student,
                autoencoder,
                labels[start : start + config.batch_size],
                config.sampler,
                path=trained.path,
                first_index=start,
                precision=precision,
            )
        )
    names = [str(label) for label in classes]
    try:
        save_grid(torch.cat(images), path, columns=config.per_class, row_names=names)
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def _picture(config: SampleConfig) -> Path:
    """Where the grid goes, in a folder that is there: before the work that it would lose."""
    assert config.png is not None
    path = Path(config.png).expanduser()
    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--png '{path}': no kind of picture has this ending; use .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def _unwritable(path: Path, error: OSError) -> UserError:
    reason = error.strerror or type(error).__name__
    return UserError(f"--png '{path}' cannot be written ({reason}): name a file elsewhere")


def _grid(config: SampleConfig) -> tuple[dict[str, Any], list[str]]:
    began = time.perf_counter()
    path = draw_grid(config)
    images = config.per_class * len((0,) if config.classes is None else config.classes)
    seconds = time.perf_counter() - began
    return {"images": images, "png": str(path), "seconds": seconds}, [str(path)]


def _many(config: SampleConfig) -> tuple[dict[str, Any], list[str]]:
    from pipeline.sampling.job import (
        sample_many,  # Ray takes seconds to import, and a grid needs none
    )

    sampled = sample_many(config)
    print(
        f"{sampled.images} images, {sampled.resumed} of them from an earlier run; "
        f"{sampled.images_per_second:.2f} images/s"
    )
    return asdict(sampled), [place for place in (sampled.npz, sampled.folder) if place is not None]


if __name__ == "__main__":
    run_command(main)
