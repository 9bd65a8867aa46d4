"""Pictures of several runs, next to each other at equal steps."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import fsspec
from markupsafe import Markup
from PIL import Image

from pipeline.report.rendering import data_uri
from pipeline.storage.files import read_at_most
from pipeline.storage.redaction import redact
from pipeline.text import shortened
from schemas.errors import UserError, plain_text

MAX_STEPS = 6
MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 64 << 20
MAX_SIDE = 1400
"""Pixels of a picture in the page; larger ones are scaled down."""
MAX_CAPTIONS = 100
"""Captions, or names of rows, of a picture that are written below it."""
MAX_PNG_BYTES = 160_000
"""Larger ones become JPEG."""


class BadPictureError(Exception):
    """A file that is not a usable picture; the message says why."""


class Source(NamedTuple):
    """The pictures of one run."""

    label: str
    name: Markup
    """The label as it is shown."""
    steps: Sequence[int]
    load: Callable[[int], bytes]
    """The PNG file of a step. Raises ``UserError``, ``OSError`` or ``BadPictureError``."""


class Figure(NamedTuple):
    """A run's picture at one step, or the reason why it is missing."""

    label: str
    name: Markup
    image: Markup | None = None
    """A ``data:`` URI."""
    missing: str | None = None
    captions: Sequence[str] = ()
    """Different captions of the picture, in the order of its rows."""
    rows: Sequence[str] = ()
    """Names of the picture's rows, which are classes."""


class Gallery(NamedTuple):
    """Pictures by step, and sentences about those that are not shown."""

    notes: list[str]
    steps: list[tuple[int, list[Figure]]]


def make_gallery(sources: Sequence[Source], warnings: list[str]) -> Gallery | None:
    """The pictures of the runs that have any, None if there are none. Adds a sentence to
    ``warnings`` for each picture that cannot be read."""
    available = [source for source in sources if source.steps]
    if not available:
        return None
    steps, note = choose_steps({source.label: source.steps for source in available})
    missing = [source.label for source in sources if not source.steps]
    notes = [note] if note else []
    if missing:
        notes.append(f"None were drawn by {', '.join(missing)}.")
    rows = [(step, [_figure(source, step, warnings) for source in available]) for step in steps]
    return Gallery(notes, rows)


def choose_steps(
    steps_of: Mapping[str, Sequence[int]], count: int = MAX_STEPS
) -> tuple[list[int], str]:
    """``count`` steps at most, evenly chosen and with the last, and a sentence where the runs'
    steps differ."""
    sets = [set(steps) for steps in steps_of.values()]
    common, union = set.intersection(*sets), set.union(*sets)
    chosen = _evenly(sorted(common or union), count)
    if not common:
        return chosen, "The runs have no step in common: each step shows the runs that have it."
    if common != union:
        return chosen, "Some steps are missing in some runs: only common steps are shown."
    return chosen, ""


def load_file(filesystem: fsspec.AbstractFileSystem, path: str) -> bytes:
    """A picture file of ``MAX_FILE_BYTES`` at most."""
    data = read_at_most(filesystem, path, MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise BadPictureError(f"has more than {MAX_FILE_BYTES >> 20} MiB")
    return data


def small_picture(data: bytes) -> tuple[bytes, str]:
    """A PNG file encoded again, no larger than a page needs; its bytes and media type. Raises
    ``BadPictureError`` where ``data`` is not a complete PNG file."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise BadPictureError(f"has {width} x {height} pixels, more than {MAX_PIXELS}")
            picture = opened.convert("RGBA" if opened.has_transparency_data else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = plain_text(str(error)).partition(" <_io")[0]
        raise BadPictureError(f"is not a complete PNG file: {reason or 'damaged'}") from None
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    if file.tell() <= MAX_PNG_BYTES:
        return file.getvalue(), "image/png"
    file = io.BytesIO()
    paper = Image.new("RGB", picture.size, "white")
    paper.paste(picture, mask=picture.getchannel("A") if picture.mode == "RGBA" else None)
    paper.save(file, "JPEG", quality=88)
    return file.getvalue(), "image/jpeg"


def read_captions(data: bytes, key: str = "captions") -> list[str]:
    """The captions, or with the key ``rows`` the names of rows, that a PNG file of samples holds,
    each once, shortened; empty where it holds none."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        picture.load()  # texts may follow the pixels
        text = picture.info.get(key)
    try:
        captions = json.loads(text) if isinstance(text, str) else []
    except (ValueError, RecursionError):
        captions = []
    if not isinstance(captions, list):
        return []
    texts = dict.fromkeys(shortened(plain_text(text)) for text in captions if type(text) is str)
    return list(texts)[:MAX_CAPTIONS]


def _figure(source: Source, step: int, warnings: list[str]) -> Figure:
    figure = Figure(source.label, source.name)
    if step not in source.steps:
        return figure._replace(missing="not drawn at this step")
    try:
        data = source.load(step)
        image = data_uri(*small_picture(data))
        captions, rows = read_captions(data), read_captions(data, "rows")
        return figure._replace(image=image, captions=captions, rows=rows)
    except (BadPictureError, UserError, OSError) as error:
        warnings.append(f"{source.label}: the picture of step {step:,} {redact(str(error))}")
        return figure._replace(missing="cannot be shown")


def _evenly(steps: Sequence[int], count: int) -> list[int]:
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]
