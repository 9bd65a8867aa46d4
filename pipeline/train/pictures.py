"""Grids of samples that are drawn while a run trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.autoencoders import Autoencoder
from pipeline.files import TEMPORARY
from pipeline.models import SiT
from pipeline.pictures import save_grid
from pipeline.sampling.draw import check_sampler, draw_images
from pipeline.train.parallel import Parallel
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.store import Manifest

SAMPLES = "samples"
"""The folder of the grids, below a run's."""


class SharedDrawing:
    """Images that all workers draw together: the same whatever their number, as each takes whole
    batches of a fixed division."""

    def __init__(self, config: RunConfig, manifest: Manifest, parallel: Parallel) -> None:
        """Raises ``UserError`` where the autoencoder cannot be loaded, or does not fit."""
        self.options = config.samples
        self.path = config.diffusion.path
        self.parallel = parallel
        check_sampler(config.student, self.options.sampler, option="--samples.sampler.method")
        stored = manifest.autoencoder
        self.autoencoder = Autoencoder(
            self.options.autoencoder or stored.name, option="--samples.autoencoder"
        )
        self.resolution = manifest.resolution

    def mine(self, count: int) -> list[range]:
        """The batches of ``count`` images that this worker draws, by number."""
        size = self.options.batch_size
        batches = [range(first, min(first + size, count)) for first in range(0, count, size)]
        return batches[self.parallel.rank :: self.parallel.world_size]

    def draw(self, student: SiT, labels: Sequence[int], numbers: range) -> Tensor:
        """uint8 (B, 3, R, R) on the CPU: the images with these numbers."""
        return draw_images(
            student,
            self.autoencoder,
            [labels[number] for number in numbers],
            self.options.sampler,
            path=self.path,
            first_index=numbers.start,
        )


class SampleGrids:
    """``samples/step-STEP.png`` of a run, from the same noise and classes at every step."""

    def __init__(
        self, config: RunConfig, manifest: Manifest, parallel: Parallel, folder: Path
    ) -> None:
        self.every, self.last = config.samples.every, config.steps
        self.classes = grid_classes(config, manifest)
        self.per_class = config.samples.per_class
        self.parallel = parallel
        self.folder = folder / SAMPLES
        self.drawing = SharedDrawing(config, manifest, parallel)

    def due(self, step: int) -> bool:
        return self.every is not None and (step % self.every == 0 or step == self.last)

    def draw(self, student: SiT, step: int) -> None:
        """Every worker calls this; the first one writes the picture."""
        drawing, device = self.drawing, self.parallel.device
        labels = [label for label in self.classes for _ in range(self.per_class)]
        size = drawing.resolution
        images = torch.zeros(len(labels), 3, size, size, dtype=torch.uint8, device=device)
        drawing.autoencoder.to(device)
        try:
            for numbers in drawing.mine(len(labels)):
                images[numbers.start : numbers.stop] = drawing.draw(student, labels, numbers)
        finally:
            drawing.autoencoder.to("cpu")  # its memory is the training's
        self.parallel.sum(images)  # each image is somebody's, and black elsewhere
        if self.parallel.is_first:
            self._write(images.cpu(), step)

    def _write(self, images: Tensor, step: int) -> None:
        name = f"step-{step:09d}.png"
        temporary = self.folder / f"{TEMPORARY}{name}"
        names = [str(label) for label in self.classes]
        save_grid(images, temporary, columns=self.per_class, row_names=names)
        os.replace(temporary, self.folder / name)


def grid_classes(config: RunConfig, manifest: Manifest) -> tuple[int, ...]:
    """The rows of the grid. Raises ``UserError`` where one of them is no class of the store."""
    known = manifest.dataset.num_classes
    classes = config.samples.classes
    if classes is None:
        return tuple(range(min(8, known)))
    if not classes or max(classes) >= known:
        raise UserError(
            f"--samples.classes {','.join(map(str, classes))}: the store has classes 0 to "
            f"{known - 1}; name at least one of them"
        )
    return classes
