"""A grid of images from a trained checkpoint, drawn by this process: `jobs/sample.py --png`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from pipeline.autoencoders import open_decoder
from pipeline.checkpoints.resolve import find_checkpoint, local_copy
from pipeline.checkpoints.student import LoadedStudent, load_trained_student
from pipeline.cli.progress import progress_bar
from pipeline.datasets.class_names import row_name
from pipeline.precision import choose_arithmetic, choose_device
from pipeline.sampling.batches import choose_classes, plan_batches
from pipeline.sampling.generate import compile_student, draw_images
from pipeline.sampling.options import check_options
from pipeline.sampling.prompts import (
    PromptEmbedder,
    Prompts,
    StoredPrompts,
    check_conditions,
    complete_student,
    open_prompts,
)
from pipeline.visualization.image_grid import save_grid
from schemas.errors import UserError
from schemas.sample import SampleConfig

MAX_COLUMNS, STORED_ROWS, MAX_IMAGES = 8, 8, 4096
"""Columns of a grid of one image for each caption; captions of a store; images of captions."""


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
    """Draw ``config.per_class`` images of each class or caption and write them to ``config.png``,
    one row for each class; captions stand below their images. Raises ``UserError``."""
    check_options(config)
    started = time.perf_counter()
    png = _make_folder_of(config)  # a path that cannot be written fails before the sampling
    prompts = open_prompts(config)
    with local_copy(find_checkpoint(config.checkpoint), config.weights) as checkpoint:
        trained = load_trained_student(
            checkpoint, config.weights, config.model, config.file_options
        )
    student = trained.student
    check_conditions(config, trained)
    rows, names = _choose_rows(config, trained, prompts)
    device = choose_device(config.device)
    embedder, captions = None, []
    if prompts is not None and trained.text_encoder is not None:
        embedder = PromptEmbedder(prompts, trained.text_encoder, config, device=device)
        complete_student(trained, embedder)
        embedder.truncated(len(rows))
        captions = [text for text in prompts.texts(rows) for _ in range(config.per_class)]
    precision = choose_arithmetic(config.precision, device)
    autoencoder = open_decoder(config.autoencoder, trained.encoder)
    student.to(device)
    autoencoder.to(device)
    if config.compile:
        compile_student(student)
    labels = [row for row in rows for _ in range(config.per_class)]
    images = []
    with progress_bar(total=len(labels), unit="image", desc="sample") as bar:
        for batch in plan_batches(len(labels), config.batch_size):
            part = labels[batch.first : batch.first + batch.count]
            drawn = draw_images(
                student,
                autoencoder,
                part if embedder is None else embedder(part),
                config.sampler,
                first_index=batch.first,
                precision=precision,
            )
            images.append(drawn)
            bar.update(batch.count)
    # captions stand below their pictures, so that single ones need no row of their own
    single = config.per_class == 1 and len(captions) > 0
    columns = min(MAX_COLUMNS, len(rows)) if single else config.per_class
    try:
        save_grid(torch.cat(images), png, columns, row_names=names, captions=captions)
    except OSError as error:
        raise _unwritable(png, error) from None
    return GridSummary(len(labels), str(png), time.perf_counter() - started)


def _choose_rows(
    config: SampleConfig, trained: LoadedStudent, prompts: Prompts | None
) -> tuple[Sequence[int], list[str]]:
    """Classes of a grid and their names, or numbers of captions: all that are given, or the first
    ones of a store."""
    if prompts is None:
        requested = trained.classes.trained[:1] if config.classes is None else config.classes
        classes = choose_classes(requested, trained.classes)
        return classes, [row_name(label, trained.classes) for label in classes]
    if isinstance(prompts, StoredPrompts):
        return range(min(STORED_ROWS, prompts.count)), []
    if prompts.count * config.per_class > MAX_IMAGES:
        raise UserError(
            f"--png: {prompts.count} captions with --per-class {config.per_class} are more than "
            f"{MAX_IMAGES} images for a grid: use --num with --folder or --npz"
        )
    return range(prompts.count), []


def _make_folder_of(config: SampleConfig) -> Path:
    """Path of the grid; its folder exists afterwards."""
    assert config.png is not None
    path = Path(config.png).expanduser()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--png '{path}': '{path.suffix}' is not an image format; use .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def _unwritable(path: Path, error: OSError) -> UserError:
    reason = error.strerror or type(error).__name__
    return UserError(f"--png '{path}' cannot be written ({reason}): choose another file")
