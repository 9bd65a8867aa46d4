"""Grid of images as a picture file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from schemas.errors import plain_text

CAPTIONS, ROWS = "captions", "rows"
"""Keys of a PNG file's texts."""
CAPTION_SIZE, CAPTION_LINES = 11, 3
"""Font size in pixels of captions, and lines at most."""


def save_grid(
    images_B3RR: Tensor,
    path: Path,
    columns: int,
    *,
    row_names: Sequence[str] = (),
    captions: Sequence[str] = (),
    gap: int = 2,
) -> None:
    """Write uint8 images row by row on a white background; images of less than 96 pixels are
    enlarged. ``row_names`` are written on the left, the caption of each image below it; a PNG file
    also holds both as its texts ``rows`` and ``captions``, lists in JSON."""
    images = images_B3RR.permute(0, 2, 3, 1).numpy()
    count, height, width, _ = images.shape
    scale = max(1, 96 // height)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width, rows = height * scale, width * scale, -(-count // columns)
    texts = [wrap_caption(caption, width) for caption in captions]
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    below = lines * (CAPTION_SIZE + 3)
    margin = 12 * max((len(name) for name in row_names), default=0)
    shape = (rows * (height + below + gap) + gap, margin + columns * (width + gap) + gap, 3)
    canvas = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        top = gap + i // columns * (height + below + gap)
        left = margin + gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(row_names):
        middle = gap + row * (height + below + gap) + height // 2
        draw.text((margin // 2, middle), name, fill="black", anchor="mm", font_size=18)
    for i, text in enumerate(texts):
        top = gap + i // columns * (height + below + gap) + height
        centre = margin + gap + i % columns * (width + gap) + width // 2
        place = {"anchor": "ma", "align": "center", "spacing": 2, "font_size": CAPTION_SIZE}
        draw.text((centre, top + 1), text, fill="black", **place)
    if path.suffix.lower() != ".png":
        picture.save(path)
        return
    texts_of_file = PngInfo()
    for key, values in ((CAPTIONS, captions), (ROWS, row_names)):
        if values:
            texts_of_file.add_itxt(key, json.dumps(list(values)))
    picture.save(path, pnginfo=texts_of_file)


def wrap_caption(caption: str, width: int) -> str:
    """``caption`` in lines of ``width`` pixels at most, the last one cut where it is longer."""
    font = ImageFont.load_default(CAPTION_SIZE)
    lines = [""]
    for word in plain_text(caption).split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    cut = len(lines) > CAPTION_LINES
    lines = lines[:CAPTION_LINES]
    for number, line in enumerate(lines):
        ends = "\N{HORIZONTAL ELLIPSIS}" if cut and number == CAPTION_LINES - 1 else ""
        if font.getlength(line + ends) > width:
            ends = "\N{HORIZONTAL ELLIPSIS}"
            while line and font.getlength(line + ends) > width:
                line = line[:-1]
        lines[number] = line + ends
    return "\n".join(lines)
