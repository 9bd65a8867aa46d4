"""Sets of small images for evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def blobs(count: int, *, seed: int, size: int = 32, mean: float = 120) -> torch.Tensor:
    """uint8 (count, 3, size, size): random patches of colour."""
    rng = np.random.default_rng(seed)
    values = rng.normal(mean, 60, (count, 3, 4, 4)).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(values.repeat(size // 4, 2).repeat(size // 4, 3))


class ArrayImages:
    """Images in memory."""

    kind = "test images"

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.count = len(images)
        self.about: dict[str, Any] = {}

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        yield from self.images.split(size)
