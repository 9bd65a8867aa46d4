"""Captions to draw: `jobs/sample.py --captions`."""

from __future__ import annotations

import json
from typing import Any

from pipeline.datasets.captions import MAX_JSON_BYTES, parse_captions
from pipeline.datasets.coco import parse_annotations
from pipeline.storage.files import open_url, read_at_most, redact
from schemas.errors import UserError
from schemas.sample import check_caption

Alternatives = tuple[str, ...]
"""Captions of one image, of which one is drawn."""


def read_captions(file: str, option: str = "--captions") -> list[Alternatives]:
    """Captions of each image in a file, by its suffix: .json, .jsonl, else a text of one caption a
    line. Raises ``UserError`` that names ``option`` and the line."""
    where = f"{option} '{redact(file)}'"
    text = _read(file, where, option)
    if file.lower().endswith(".json"):
        return _from_json(text, where)
    lines = text.removesuffix("\n").split("\n")
    places = [f"{where}, line {number}" for number in range(1, len(lines) + 1)]
    if file.lower().endswith(".jsonl"):
        entries = zip(lines, places, strict=True)
        return [_alternatives(_parse(line, at), at) for line, at in entries]
    return [_alternatives(line, at) for line, at in zip(lines, places, strict=True)]


def _read(file: str, where: str, option: str) -> str:
    filesystem, path = open_url(file, what=option)
    try:
        data = read_at_most(filesystem, path, MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{where}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{where}: is a folder; expected a file of captions") from None
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{where}: is longer than {MAX_JSON_BYTES >> 20} MB")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise UserError(f"{where}: is not text in UTF-8") from None
    if not text.strip():
        raise UserError(f"{where}: is empty; expected captions")
    return text


def _from_json(text: str, where: str) -> list[Alternatives]:
    """A list of captions, or COCO's annotations in the order of image ids; images without captions
    and blank captions of these are left out, as in an extraction."""
    content = _parse(text, where)
    if isinstance(content, list) and content:
        return [_alternatives(entry, f"{where}, entry {n}") for n, entry in enumerate(content, 1)]
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a list of captions, or COCO's images and annotations")
    found = parse_annotations(content, where)
    texts = (found.captions.get(number, []) for number in found.images)
    captions = [tuple(t for t in of_image if t.strip()) for of_image in texts]
    if not any(captions):
        raise UserError(f"{where}: has no image with a caption")
    return [of_image for of_image in captions if of_image]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: is not JSON") from None


def _alternatives(entry: Any, where: str) -> Alternatives:
    if isinstance(entry, dict):
        entry = entry.get("captions", entry.get("caption", 0))
    texts = parse_captions(entry)
    if texts is None:
        raise UserError(
            f'{where}: expected a text, a list of texts, {{"caption": text}} or {{"captions": '
            "[text, ...]}"
        )
    try:
        return tuple(check_caption(text) for text in texts or [""])
    except ValueError as error:
        raise UserError(f"{where}: {error}; leave it out") from None
