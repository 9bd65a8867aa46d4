"""MS-COCO 2014 in its official layout: {train,val}2014/*.jpg and annotations/captions_*2014.json.

Images are in the order of their ids and captions in that of the annotations, as U-ViT's scripts
number them through pycocotools (arXiv 2209.12152): position i of the listing is their ``{i}.npy``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.datasets.captions import captioned_listing
from pipeline.datasets.folder import list_files, make_items
from pipeline.datasets.listing import Listing
from pipeline.datasets.listing_check import short_name
from pipeline.storage.files import file_size, open_url, read_bytes, redact
from pipeline.text import short_value
from schemas.errors import UserError
from schemas.extract import Split

MAX_JSON_BYTES = 1 << 30  # COCO's has 7e7
MAX_ID = 1 << 63


@dataclass(frozen=True)
class Annotations:
    """Captions of one split."""

    images: Mapping[int, str]
    """File name by image id, ids rising."""
    captions: Mapping[int, list[str]]
    """By image id, in the order of the file; ids without an image too."""


def list_coco(source: str, split: Split) -> Listing:
    """List one split by image id. Raises ``UserError``."""
    shown, folder = redact(source), f"{split}2014"
    annotations = read_annotations(source, split)
    present = set(list_files(source, folder))
    paths = [f"{folder}/{name}" for name in annotations.images.values()]
    ids = [n for n, path in zip(annotations.images, paths, strict=True) if path in present]
    if not ids:
        raise UserError(
            f"--source '{shown}' has no image of annotations/captions_{folder}.json in {folder}/"
        )
    missing = [
        path
        for n, path in zip(annotations.images, paths, strict=True)
        if path not in present and annotations.captions.get(n)
    ]
    unknown = [n for n in annotations.captions if n not in annotations.images]
    missing += [f"image id {n}" for n in unknown]
    items = make_items([f"{folder}/{annotations.images[n]}" for n in ids], [0] * len(ids))
    prefix = len(f"{folder}/")
    named = [item._replace(key=item.key[prefix:]) for item in items]
    found = [(item, annotations.captions.get(n, [])) for n, item in zip(ids, named, strict=True)]
    unlisted = sorted(present - set(paths))
    found += [(item, []) for item in make_items(unlisted, [0] * len(unlisted))]
    return captioned_listing(found, missing, shown)


def read_annotations(source: str, split: Split) -> Annotations:
    """Images and captions of annotations/captions_{split}2014.json. Raises ``UserError``, also for
    ids that occur twice, because the second would replace the first."""
    path = f"annotations/captions_{split}2014.json"
    where = f"{redact(source)}/{path}"
    return parse_annotations(_read_json(source, path, where), where)


def parse_annotations(content: Mapping[str, Any], where: str) -> Annotations:
    """Images and captions of the JSON object of a file of captions. Raises ``UserError`` that names
    the file ``where``."""
    images: dict[int, str] = {}
    names: set[str] = set()
    for entry in _entries(content, "images", where):
        number = _id(entry, "id", "images", where)
        name = entry.get("file_name")
        if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{where}: image {number} has no file_name below its folder")
        if number in images:
            raise UserError(f"{where}: image id {number} occurs twice")
        if name in names:
            raise UserError(f"{where}: file_name '{short_name(name)}' is of two images")
        images[number] = name
        names.add(name)
    captions: dict[int, list[str]] = {}
    seen: set[int] = set()
    for entry in _entries(content, "annotations", where):
        number, image = (_id(entry, key, "annotations", where) for key in ("id", "image_id"))
        text = entry.get("caption")
        if not isinstance(text, str):
            raise UserError(f"{where}: annotation {number} has no caption that is a text")
        if number in seen:
            raise UserError(f"{where}: annotation id {number} occurs twice")
        seen.add(number)
        captions.setdefault(image, []).append(text)
    return Annotations(dict(sorted(images.items())), captions)


def _read_json(source: str, path: str, where: str) -> dict[str, Any]:
    filesystem, root = open_url(source, what="--source")
    try:
        size = file_size(filesystem, f"{root}/{path}")
        data = read_bytes(filesystem, f"{root}/{path}") if size <= MAX_JSON_BYTES else b""
    except FileNotFoundError:
        raise UserError(
            f"{where}: there is no such file; expected COCO 2014's train2014/, val2014/ and "
            "annotations/"
        ) from None
    if size > MAX_JSON_BYTES:
        raise UserError(f"{where}: has {size} bytes; the limit is {MAX_JSON_BYTES}")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: is not COCO's JSON object of images and annotations")
    return content


def _entries(content: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{where}: has no list of {key}, as captions of COCO have")
    return entries


def _id(entry: Mapping[str, Any], key: str, kind: str, where: str) -> int:
    value = entry.get(key)
    if type(value) is not int or not 0 <= value < MAX_ID:
        raise UserError(f"{where}: an entry of {kind} has {key} {short_value(json.dumps(value))}")
    return value
