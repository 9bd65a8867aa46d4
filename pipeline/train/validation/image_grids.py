"""Grids of samples that are drawn while a run trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.models import SiT
from pipeline.runs.metrics import BROKEN_SAMPLES, SAMPLES
from pipeline.storage.files import TEMPORARY
from pipeline.train.validation.sampling import DistributedSampler, Pause, is_due
from pipeline.visualization.image_grid import save_grid
from schemas.errors import UserError
from schemas.run import RunConfig


class SampleGrids:
    """``samples/step-STEP.png`` of a run, from the same noise and classes at every step."""

    def __init__(self, config: RunConfig, drawing: DistributedSampler, folder: Path) -> None:
        self.every, self.last = config.samples.every, config.steps
        self.classes = grid_classes(config, drawing.num_classes)
        self.per_class = config.samples.per_class
        self.drawing = drawing
        self.folder = folder / SAMPLES

    def due(self, step: int) -> bool:
        return is_due(step, self.every, self.last)

    def draw(self, student: SiT, step: int, pause: Pause) -> list[dict[str, Any]]:
        """Every rank calls this; the first one writes the picture. What there is to say of it."""
        drawing, parallel = self.drawing, self.drawing.parallel
        labels = [label for label in self.classes for _ in range(self.per_class)]
        size = drawing.resolution
        images = torch.zeros(len(labels), 3, size, size, dtype=torch.uint8, device=parallel.device)
        broken = 0
        for drawn in drawing.draw(student, labels, pause):
            images[drawn.numbers.start : drawn.numbers.stop] = drawn.images.to(parallel.device)
            broken += drawn.broken
        parallel.sum(images)  # each image is somebody's, and black elsewhere
        broken = parallel.sum_counts({"broken": broken})["broken"]
        if parallel.is_main:
            self._write(images.cpu(), step)
        if not broken:
            return []
        reason = f"{broken} of {len(labels)} samples of the grid are not finite numbers: black"
        return [{"event": BROKEN_SAMPLES, "reason": reason}]

    def _write(self, images: Tensor, step: int) -> None:
        path = self.folder / f"step-{step:09d}.png"
        temporary = path.with_name(f"{TEMPORARY}{path.name}")
        names = [str(label) for label in self.classes]
        save_grid(images, temporary, columns=self.per_class, row_names=names)
        os.replace(temporary, path)


def grid_classes(config: RunConfig, num_classes: int) -> tuple[int, ...]:
    """The rows of the grid. Raises ``UserError`` where one of them is no class of the store."""
    classes = config.samples.classes
    if classes is None:
        return tuple(range(min(8, num_classes)))
    if not classes or max(classes) >= num_classes:
        raise UserError(
            f"--samples.classes {','.join(map(str, classes))}: the store has classes 0 to "
            f"{num_classes - 1}; name at least one of them"
        )
    return classes
