"""Grid of images as a picture file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor


def save_grid(
    images_B3RR: Tensor, path: Path, columns: int, *, row_names: Sequence[str] = (), gap: int = 2
) -> None:
    """Write uint8 images row by row on a white background; images of less than 96 pixels are
    enlarged. ``row_names`` are written on the left."""
    images = images_B3RR.permute(0, 2, 3, 1).numpy()
    count, height, width, _ = images.shape
    scale = max(1, 96 // height)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width, rows = height * scale, width * scale, -(-count // columns)
    margin = 12 * max((len(name) for name in row_names), default=0)
    shape = (rows * (height + gap) + gap, margin + columns * (width + gap) + gap, 3)
    canvas = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        top = gap + i // columns * (height + gap)
        left = margin + gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(row_names):
        middle = gap + row * (height + gap) + height // 2
        draw.text((margin // 2, middle), name, fill="black", anchor="mm", font_size=18)
    picture.save(path)
