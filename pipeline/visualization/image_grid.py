"""Grid of images as a picture file."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pipeline.storage.files import write_local
from schemas.errors import plain_text

CAPTIONS, ROWS = "captions", "rows"
"""Keys of a PNG file's texts."""
ROW_SIZE, CAPTION_SIZE, CAPTION_LINES = 18, 11, 3
"""Font sizes in pixels of row names and captions, and lines at most of captions."""


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
    names = [unicodedata.normalize("NFC", name) for name in row_names]
    font = _font(ROW_SIZE)
    widest = max((font.getlength(name) for name in names), default=0)
    margin = math.ceil(widest) + ROW_SIZE if widest else 0
    shape = (rows * (height + below + gap) + gap, margin + columns * (width + gap) + gap, 3)
    canvas = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        top = gap + i // columns * (height + below + gap)
        left = margin + gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        middle = gap + row * (height + below + gap) + height // 2
        draw.text((margin // 2, middle), name, fill="black", anchor="mm", font=font)
    for i, text in enumerate(texts):
        top = gap + i // columns * (height + below + gap) + height
        centre = margin + gap + i % columns * (width + gap) + width // 2
        place = {"anchor": "ma", "align": "center", "spacing": 2, "font": _font(CAPTION_SIZE)}
        draw.text((centre, top + 1), text, fill="black", **place)
    kind = Image.registered_extensions()[path.suffix.lower()]
    if kind != "PNG":
        write_local(path, lambda file: picture.save(file, kind))
        return
    texts_of_file = PngInfo()
    for key, values in ((CAPTIONS, captions), (ROWS, row_names)):
        if values:
            texts_of_file.add_itxt(key, json.dumps(list(values)))
    write_local(path, lambda file: picture.save(file, kind, pnginfo=texts_of_file))


@cache
def _font(size: int) -> Any:
    """DejaVu Sans, which has the letters of most European languages, where Matplotlib brings it:
    Pillow's own font has few letters beside ASCII."""
    package = find_spec("matplotlib")
    path = (
        Path(package.origin or "" if package else "").parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    )
    return ImageFont.truetype(path, size) if path.is_file() else ImageFont.load_default(size)


def wrap_caption(caption: str, width: int) -> str:
    """``caption`` in lines of ``width`` pixels at most, the last one cut where it is longer."""
    font = _font(CAPTION_SIZE)
    lines = [""]
    for word in unicodedata.normalize("NFC", plain_text(caption)).split(" "):
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
