"""REPA's and HASTE's preprocessed ImageNet: crops in images/, their latents in vae-sd/.

Their dataset_tools.py writes images/00000/img00000000.png with ``convert`` and, from those,
vae-sd/00000/img-mean-std-00000000.npy with ``encode``, and in both folders a dataset.json of names
and labels. Their MS-COCO folders are those of ``coco_features``.
EDM2's own tool writes the same file names but gives the autoencoder another range of pixels; the
files do not show the difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from pipeline.datasets.listing import ImageItem, Listing, numbered_listing
from pipeline.storage.files import file_size, open_url, read_bytes, read_ranges, redact
from pipeline.text import short_value
from schemas.errors import UserError

LATENT = re.compile(r"([0-9]{5})/img-mean-std-([0-9]{8})\.npy")
MAX_JSON_BYTES = 1 << 30  # ImageNet's has 5e7
MAX_LABEL = 1 << 20
HEAD_BYTES = 1 << 12


def list_repa(source: str) -> Listing:
    """List every latent of vae-sd/dataset.json with the image of the same number; the key is the
    image's path without images/ and suffix. Raises ``UserError``, also for storage errors."""
    shown = redact(source)
    labels = _read_labels(source, "vae-sd")
    if not labels:
        raise UserError(
            f"--source '{shown}' lists no latents in vae-sd/dataset.json: expected images/ and "
            "vae-sd/ as written by REPA's and HASTE's dataset_tools.py (their MS-COCO folders are "
            "--dataset coco256_features)"
        )
    images = _read_labels(source, "images")
    items = []
    for name, label in sorted(labels.items()):
        match = LATENT.fullmatch(name)
        if match is None:
            raise UserError(
                f"{shown}/vae-sd/dataset.json: {_as_json(name)} is not the name of a latent such "
                "as 00000/img-mean-std-00000000.npy"
            )
        key = f"{match[1]}/img{match[2]}"
        # `encode` renumbers the images that it finds: if `convert` skipped numbers, or one folder
        # was made again, the same number may mean different images.
        if images is not None and images.get(f"{key}.png") != label:
            raise UserError(
                f"--source '{shown}': vae-sd/dataset.json gives {name} class {label}, "
                f"images/dataset.json gives {key}.png {images.get(f'{key}.png', 'none')}: these "
                "latents were made from other images"
            )
        items.append(ImageItem(key, label, f"images/{key}.png", latent=f"vae-sd/{name}"))
    return numbered_listing(items, shown)


def first_latents(source: str) -> Iterator[ImageItem]:
    """Items at the beginning of a dataset.json that ``list_repa`` has accepted, read without the
    rest of the file. Raises ``UserError``."""
    filesystem, root = open_url(source, what="--source")
    path = f"{root}/vae-sd/dataset.json"
    try:
        (head,) = read_ranges(filesystem, path, [(0, HEAD_BYTES)])
    except FileNotFoundError:
        where = f"{redact(source)}/vae-sd/dataset.json"
        raise UserError(f"{where}: there is no such file") from None
    for match in LATENT.finditer(head.decode(errors="replace")):
        key = f"{match[1]}/img{match[2]}"
        yield ImageItem(key, 0, f"images/{key}.png", latent=f"vae-sd/{match[0]}")


def _read_labels(source: str, folder: str) -> dict[str, int] | None:
    """Labels by name; None if the folder has no dataset.json. Raises ``UserError``."""
    where = f"{redact(source)}/{folder}/dataset.json"
    filesystem, root = open_url(source, what="--source")
    path = f"{root}/{folder}/dataset.json"
    try:
        size = file_size(filesystem, path)
        data = read_bytes(filesystem, path) if size <= MAX_JSON_BYTES else b""
    except FileNotFoundError:
        return None
    if size > MAX_JSON_BYTES:
        raise UserError(f"{where}: has {size} bytes; the limit is {MAX_JSON_BYTES}")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None
    entries = content.get("labels", "none") if isinstance(content, dict) else "none"
    if entries is None:
        # Refused in images/, too: without classes, `encode` uses the folder numbers as labels.
        raise UserError(
            f"{where}: its labels are null: these images were prepared without classes; make both "
            "folders again from images in one folder per class"
        )
    if not isinstance(entries, list):
        raise UserError(f'{where}: expected {{"labels": [[name, class number], ...]}}')
    labels: dict[str, int] = {}
    for number, entry in enumerate(entries):
        name, label = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if type(name) is not str or type(label) is not int or not 0 <= label < MAX_LABEL:
            raise UserError(
                f"{where}: entry {number} is {_as_json(entry)}; expected [name, class number]"
            )
        if name in labels:
            raise UserError(f"{where}: entry {number} repeats {_as_json(name)}")
        labels[name] = label
    return labels


def _as_json(value: object) -> str:
    return short_value(json.dumps(value))
