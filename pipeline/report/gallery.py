"""Pictures that runs left behind, side by side at equal steps."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import fsspec
from PIL import Image

from pipeline.report.markup import Html, breakable, image, tag
from pipeline.storage.files import read_at_most
from pipeline.storage.redaction import redact
from schemas.errors import UserError

MAX_STEPS = 6
MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 64 << 20
MAX_SIDE = 1400
"""Pixels of a picture in the page; larger ones are made smaller."""
MAX_PNG_BYTES = 160_000
"""Larger ones become JPEG."""


class BadPictureError(Exception):
    """A file that is no picture; says why."""


class Source(NamedTuple):
    """The pictures of one run."""

    label: str
    swatch: Html
    steps: Sequence[int]
    load: Callable[[int], bytes]
    """The PNG file of a step. Raises ``UserError``, ``OSError`` or ``BadPictureError``."""


def gallery(
    sources: Sequence[Source], what: str, warn: Callable[[str, str], None], *, wide: bool
) -> list[Html]:
    """A heading and a row of pictures for each step that is shown. ``what`` they are goes into
    their descriptions; ``warn`` takes a run's label and what is wrong with a picture. ``wide`` ones
    stand below each other on a phone."""
    having = [source for source in sources if source.steps]
    if not having:
        return []
    steps, note = choose_steps({source.label: source.steps for source in having})
    nodes = [tag("p", note, class_="note")] if note else []
    missing = [source.label for source in sources if not source.steps]
    if missing:
        nodes.append(tag("p", f"None were drawn by {', '.join(missing)}.", class_="note"))
    for step in steps:
        figures = [_figure(source, step, what, warn) for source in having]
        nodes.append(tag("h3", f"Step {step:,}"))
        kind = "pictures" + (" one" if len(having) == 1 else " wide" if wide else "")
        nodes.append(tag("div", figures, class_=kind))
    return nodes


def choose_steps(
    steps_of: Mapping[str, Sequence[int]], most: int = MAX_STEPS
) -> tuple[list[int], str]:
    """Steps to show, evenly chosen, with the last; and a sentence where the runs' steps differ."""
    sets = [set(steps) for steps in steps_of.values()]
    common, any_of = set.intersection(*sets), set.union(*sets)
    chosen = _evenly(sorted(common or any_of), most)
    if not common:
        return chosen, "The runs have no step in common: each shows what it drew."
    if common != any_of:
        return chosen, "Some steps were not drawn by all runs: shown are those that were."
    return chosen, ""


def load_file(filesystem: fsspec.AbstractFileSystem, path: str) -> bytes:
    """A picture's bytes, up to a bound that no picture needs."""
    data = read_at_most(filesystem, path, MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise BadPictureError(f"has more than {MAX_FILE_BYTES >> 20} MiB")
    return data


def small_picture(data: bytes) -> tuple[bytes, str]:
    """A PNG file drawn anew, no larger than a page needs; its bytes and media type. Raises
    ``BadPictureError`` where it is none."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise BadPictureError(f"has {width} x {height} pixels, which is too many")
            picture = opened.convert("RGBA" if opened.has_transparency_data else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()).partition(" <_io")[0]
        raise BadPictureError(f"is no whole PNG picture: {reason or 'damaged'}") from None
    if max(picture.size) > MAX_SIDE:
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


def _figure(source: Source, step: int, what: str, warn: Callable[[str, str], None]) -> Html:
    caption = tag("figcaption", source.swatch, breakable(source.label))
    if step not in source.steps:
        return tag("figure", tag("p", "not drawn at this step", class_="missing"), caption)
    try:
        data, kind = small_picture(source.load(step))
    except (BadPictureError, UserError, OSError) as error:
        reason = redact(str(error))
        warn(source.label, f"the picture of step {step:,} {reason}")
        return tag("figure", tag("p", "cannot be shown", class_="missing"), caption)
    return tag("figure", image(data, kind, f"{what} of {source.label} at step {step}"), caption)


def _evenly(steps: Sequence[int], most: int) -> list[int]:
    if len(steps) <= most:
        return list(steps)
    places = [round(i * (len(steps) - 1) / (most - 1)) for i in range(most)]
    return [steps[place] for place in places]
