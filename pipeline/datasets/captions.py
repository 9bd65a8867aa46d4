"""Captions of images: rules for what a store keeps, their counts, and captions in JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence

from pipeline.datasets.folder import list_files, make_items
from pipeline.datasets.listing import ImageItem, Listing
from pipeline.datasets.listing_check import short_name
from pipeline.storage.files import absolute_url, open_url, read_at_most, redact
from schemas.errors import UserError
from schemas.store import MAX_CAPTION_BYTES, CaptionCounts
from schemas.streams import MAX_CAPTIONS

MAX_JSON_BYTES = 1 << 30

logger = logging.getLogger(__name__)


def captioned_listing(
    found: Iterable[tuple[ImageItem, Sequence[str]]], without_images: Sequence[str], shown: str
) -> Listing:
    """The listing of images with captions, all of one class, because captions take its place.

    Captions that are blank are left out, because they condition on nothing; of more than
    ``MAX_CAPTIONS`` of an image the first are kept; images without captions are left out. Each is
    counted. ``without_images`` names captions whose image is missing, ``shown`` is the redacted
    source. Raises ``UserError`` when no image has a caption.
    """
    items, bare = [], []
    empty = beyond = shortened = 0
    for item, captions in found:
        texts = [text for text in captions if text.strip()]
        empty += len(captions) - len(texts)
        beyond += max(0, len(texts) - MAX_CAPTIONS)
        if texts:
            kept = tuple(_storable(text) for text in texts[:MAX_CAPTIONS])
            pairs = zip(texts, kept, strict=False)
            shortened += sum(len(text) > len(short) for text, short in pairs)
            items.append(item._replace(captions=kept))
        else:
            bare.append(_place(item))
    if not items:
        reasons = [f"--source '{shown}' has no image with a caption"]
        if bare:
            reasons.append(f"{len(bare)} images have none, first: {short_name(bare[0])}")
        if without_images:
            first = short_name(without_images[0])
            reasons.append(f"captions are of {len(without_images)} missing images, first: {first}")
        raise UserError("; ".join(reasons))
    counts = CaptionCounts(
        captions=sum(len(item.captions) for item in items),
        empty=empty,
        beyond_limit=beyond,
        images_without=len(bare),
        without_images=len(without_images),
        shortened=shortened,
    )
    _report(counts, bare, without_images, shown)
    return Listing(items, 1, captions=counts)


def _place(item: ImageItem) -> str:
    """The file of an image; in a tar also its sample."""
    return item.path if item.length is None else f"{item.path}: sample '{item.key}'"


def _storable(text: str) -> str:
    """A caption in at most ``MAX_CAPTION_BYTES`` of UTF-8, without the zeros that separate captions
    in a store. JSON may hold half of a surrogate pair, which UTF-8 cannot."""
    data = text.replace("\0", " ").encode(errors="replace")
    return data[:MAX_CAPTION_BYTES].decode(errors="ignore")


def parse_captions(value: object) -> list[str] | None:
    """Captions of a JSON value: a text, a list of texts, or null for none; None where it is
    something else."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return list(value)
    return None


def list_captioned_folder(source: str, file: str) -> Listing:
    """List the files below ``source`` that ``file``, of JSON lines {"file": path below the source,
    "captions": [text, ...]} or {..., "caption": text}, names, in the order of their paths. Raises
    ``UserError``."""
    try:
        captions = read_caption_lines(file)
    except FileNotFoundError:
        raise UserError(f"--captions '{redact(file)}': there is no such file") from None
    beside = f"{absolute_url(source).rstrip('/')}/"
    own = absolute_url(file).removeprefix(beside)  # the list itself may lie below the source
    paths = [path for path in list_files(source) if path != own]
    missing = sorted(captions.keys() - set(paths))
    items = make_items(paths, [0] * len(paths))
    found = [(item, captions.get(item.path, [])) for item in items]
    return captioned_listing(found, missing, redact(source))


def read_caption_lines(file: str) -> dict[str, list[str]]:
    """Captions by path, of a file of JSON lines. Raises ``FileNotFoundError``, ``UserError``."""
    shown = f"--captions '{redact(file)}'"
    filesystem, path = open_url(file, what="--captions")
    try:
        data = read_at_most(filesystem, path, MAX_JSON_BYTES + 1)
    except IsADirectoryError:
        raise UserError(f"{shown}: is a folder; expected a file of JSON lines") from None
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{shown}: is longer than {MAX_JSON_BYTES >> 20} MB")
    captions: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError):
            raise UserError(f"{shown}, line {number}: is not JSON in UTF-8") from None
        known = isinstance(entry, dict) and isinstance(entry.get("file"), str)
        texts = parse_captions(entry.get("captions", entry.get("caption"))) if known else None
        if texts is None:
            raise UserError(
                f'{shown}, line {number}: expected {{"file": path below --source, "captions": '
                "[text, ...]}"
            )
        name = entry["file"].removeprefix("./")
        if name in lines:
            raise UserError(
                f"{shown}, line {number}: '{short_name(name)}' is in line {lines[name]}, too; give "
                "all captions of an image in one line"
            )
        lines[name], captions[name] = number, texts
    return captions


def _report(
    counts: CaptionCounts, bare: Sequence[str], without_images: Sequence[str], shown: str
) -> None:
    """Log what was left out, with the first of each kind."""
    if counts.empty:
        logger.warning("'%s': left out %d empty captions", shown, counts.empty)
    if counts.beyond_limit:
        logger.warning(
            "'%s': left out %d captions beyond the first %d of an image",
            shown,
            counts.beyond_limit,
            MAX_CAPTIONS,
        )
    if counts.shortened:
        logger.warning(
            "'%s': left out the end of %d captions of more than %d bytes",
            shown,
            counts.shortened,
            MAX_CAPTION_BYTES,
        )
    if bare:
        logger.warning(
            "'%s': left out %d images without captions, first: %s",
            shown,
            len(bare),
            short_name(bare[0]),
        )
    if without_images:
        logger.warning(
            "'%s': ignored the captions of %d missing images, first: %s",
            shown,
            len(without_images),
            short_name(without_images[0]),
        )
