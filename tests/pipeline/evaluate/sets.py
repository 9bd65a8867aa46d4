"""Sets of small images for evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from schemas.sample import SampleAbout


def blobs(count: int, *, seed: int, size: int = 32, mean: float = 120) -> torch.Tensor:
    """uint8 (count, 3, size, size): random patches of colour."""
    rng = np.random.default_rng(seed)
    values = rng.normal(mean, 60, (count, 3, 4, 4)).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(values.repeat(size // 4, 2).repeat(size // 4, 3))


def about_samples(**changes: Any) -> SampleAbout:
    """Description of 20 images that ``jobs/sample.py`` drew."""
    values: dict[str, Any] = {
        "checkpoint": "/runs/x/checkpoint-000000300",
        "step": 300,
        "model": "SiT-S/2",
        "weights": "model",
        "weights_sha256": "a" * 64,
        "path": "linear",
        "autoencoder": "demo",
        "autoencoder_sha256": "b" * 64,
        "image_size": 32,
        "num": 20,
        "labels": "random",
        "classes": tuple(range(10)),
        "batch_size": 8,
        "precision": "float32",
        "device": "cpu",
        "sampler": {"steps": 50},
        "version": "0",
    }
    return SampleAbout.model_validate({**values, **changes})


class ArrayImages:
    """Images in memory."""

    kind = "test images"

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.count = len(images)
        self.info: SampleAbout | None = None

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        yield from self.images.split(size)
