"""Grids of samples of a run while it trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.datasets.class_names import row_name
from pipeline.models import Student
from pipeline.runs.compatibility import grid_classes
from pipeline.runs.directory import SAMPLES
from pipeline.runs.metrics import BROKEN_SAMPLES
from pipeline.storage.files import TEMPORARY
from pipeline.train.validation.sampling import DistributedSampler
from pipeline.train.validation.schedule import Pause, is_due
from pipeline.visualization.image_grid import save_grid
from schemas.run import RunConfig

MAX_CAPTIONS = 8
"""Captions of a grid, one a row."""


class SampleGrids:
    """``samples/step-STEP.png`` of a run, from the same noise and classes or captions at every
    step."""

    def __init__(self, config: RunConfig, sampler: DistributedSampler, folder: Path) -> None:
        self.every, self.last = config.samples.every, config.steps
        embedder = sampler.embedder
        self.captions: list[str] = []
        if embedder is None:
            self.rows = grid_classes(config, sampler.classes)
        else:
            self.rows = tuple(range(min(MAX_CAPTIONS, embedder.prompts.count)))
            texts = embedder.prompts.texts(self.rows)
            self.captions = [text for text in texts for _ in range(config.samples.per_class)]
        self.per_class = config.samples.per_class
        self.sampler = sampler
        self.folder = folder / SAMPLES

    def due(self, step: int) -> bool:
        return is_due(step, self.every, self.last)

    def draw(self, student: Student, step: int, pause: Pause) -> list[dict[str, Any]]:
        """Draw the grid; every rank calls this, the main rank writes it. Returns metrics events."""
        sampler, group = self.sampler, self.sampler.group
        labels = [label for label in self.rows for _ in range(self.per_class)]
        size = sampler.resolution
        images = torch.zeros(len(labels), 3, size, size, dtype=torch.uint8, device=group.device)
        broken = 0
        for batch in sampler.sample(student, labels, pause):
            images[batch.numbers.start : batch.numbers.stop] = batch.images.to(group.device)
            broken += batch.broken
        group.sum(images)  # each image is nonzero on one rank only
        broken = group.sum_counts({"broken": broken})["broken"]
        if group.is_main:
            self._write(images.cpu(), step)
        if not broken:
            return []
        reason = f"{broken} of {len(labels)} samples of the grid are not finite numbers: black"
        return [{"event": BROKEN_SAMPLES, "reason": reason}]

    def _write(self, images: Tensor, step: int) -> None:
        path = self.folder / f"step-{step:09d}.png"
        temporary = path.with_name(f"{TEMPORARY}{path.name}")
        captions, names = self.captions, []
        if not captions:
            names = [row_name(label, self.sampler.classes) for label in self.rows]
        save_grid(images, temporary, self.per_class, row_names=names, captions=captions)
        os.replace(temporary, path)
