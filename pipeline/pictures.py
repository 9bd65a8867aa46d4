"""Arrays to picture files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def save_grid(images_B3RR: Tensor, path: Path, columns: int, *, gap: int = 2) -> None:
    """uint8 images row by row on white, small ones enlarged so that a person can see them."""
    images = images_B3RR.permute(0, 2, 3, 1).numpy()
    count, height, width, _ = images.shape
    scale = max(1, 96 // height)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width, rows = height * scale, width * scale, -(-count // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, 3)
    canvas = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        top = gap + i // columns * (height + gap)
        left = gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).save(path)
