"""A grid of images from a trained checkpoint, drawn by this process: `jobs/sample.py --png`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from pipeline.autoencoders import open_decoder
from pipeline.checkpoints.resolve import find_checkpoint, local_copy
from pipeline.checkpoints.student import load_trained_student
from pipeline.cli.progress import progress_bar
from pipeline.datasets.class_names import row_name
from pipeline.precision import choose_arithmetic, choose_device
from pipeline.sampling.batches import choose_classes, plan_batches
from pipeline.sampling.generate import check_guidance, check_sampler, draw_images
from pipeline.sampling.options import check_options
from pipeline.visualization.image_grid import save_grid
from schemas.errors import UserError
from schemas.sample import SampleConfig


@dataclass(frozen=True)
class GridSummary:
    """Result of ``draw_grid``."""

    images: int
    png: str
    seconds: float

    @property
    def files(self) -> list[str]:
        return [self.png]


def draw_grid(config: SampleConfig) -> GridSummary:
    """Draw ``config.per_class`` images of each class and write them to ``config.png``, one row for
    each class. Raises ``UserError``."""
    check_options(config)
    started = time.perf_counter()
    png = _make_folder_of(config)  # a path that cannot be written fails before the sampling
    with local_copy(find_checkpoint(config.checkpoint), config.weights) as checkpoint:
        trained = load_trained_student(
            checkpoint, config.weights, config.model, config.file_options
        )
    student = trained.student
    check_sampler(student.config, config.sampler)
    check_guidance(student.null_label, config.sampler, option="--sampler.guidance")
    requested = trained.classes.trained[:1] if config.classes is None else config.classes
    classes = choose_classes(requested, trained.classes)
    device = choose_device(config.device)
    precision = choose_arithmetic(config.precision, device)
    autoencoder = open_decoder(config.autoencoder, trained.encoder)
    student.to(device)
    autoencoder.to(device)
    labels = [label for label in classes for _ in range(config.per_class)]
    images = [
        draw_images(
            student,
            autoencoder,
            labels[batch.first : batch.first + batch.count],
            config.sampler,
            first_index=batch.first,
            precision=precision,
        )
        for batch in progress_bar(
            plan_batches(len(labels), config.batch_size), unit="part", desc="sample"
        )
    ]
    try:
        names = [row_name(label, trained.classes) for label in classes]
        save_grid(torch.cat(images), png, columns=config.per_class, row_names=names)
    except OSError as error:
        raise _unwritable(png, error) from None
    return GridSummary(len(labels), str(png), time.perf_counter() - started)


def _make_folder_of(config: SampleConfig) -> Path:
    """Path of the grid; its folder exists afterwards."""
    assert config.png is not None
    path = Path(config.png).expanduser()
    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--png '{path}': '{path.suffix}' is not an image format; use .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def _unwritable(path: Path, error: OSError) -> UserError:
    reason = error.strerror or type(error).__name__
    return UserError(f"--png '{path}' cannot be written ({reason}): choose another file")
