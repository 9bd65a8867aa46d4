"""ImageNet-1k in its distributed layouts: train/WNID/*.JPEG, or Kaggle's ILSVRC tree."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

from pipeline.datasets.folder import (
    list_class_names,
    list_files,
    make_listing,
    report_ignored,
    require_images,
)
from pipeline.datasets.listing import Listing
from pipeline.datasets.listing_check import short_name
from pipeline.storage.files import exists, open_url, read_bytes, redact
from schemas.errors import UserError

logger = logging.getLogger(__name__)

WNID = re.compile(r"n\d{8}")
TRAIN_FOLDERS = ("ILSVRC/Data/CLS-LOC/train", "train", "")


def list_imagenet(
    source: str,
    synsets: str | None,
    *,
    class_names: Sequence[str] = (),
    allow_empty: bool = False,
) -> Listing:
    """List all training images. The label is the position of the WNID in the file ``synsets``,
    else in ``class_names`` (of a store), else its rank among the sorted class folders.

    A list may have classes that the source lacks. A class folder without files is an error, or
    with ``allow_empty`` a class without images. Raises ``UserError``.
    """
    shown, shown_synsets = redact(source), redact(synsets or "")
    folder = _train_folder(source)
    found = list_files(source, folder)
    paths = [path for path in found if WNID.fullmatch(_wnid(path, folder))]
    if not paths:
        raise UserError(
            f"--source '{shown}' has no ImageNet training images: expected train/WNID/*.JPEG or "
            "ILSVRC/Data/CLS-LOC/train/WNID/*.JPEG"
        )
    report_ignored(source, [path for path in found if not WNID.fullmatch(_wnid(path, folder))])
    labels = [_wnid(path, folder) for path in paths]
    folders = [name for name in list_class_names(source, folder) if WNID.fullmatch(name)]
    present = sorted({*folders, *labels})
    _check_unpacked(found, folder, present, shown)
    classes = read_synsets(synsets) if synsets else list(class_names) or present
    missing = sorted(set(present) - set(classes))
    if missing:
        listed = f"--synsets '{shown_synsets}'" if synsets else "the store's list of classes"
        raise UserError(f"{listed} lacks {missing[0]}, a class of '{shown}'")
    if not allow_empty:
        require_images(source, sorted(set(present) - set(labels)))
    listing = make_listing(paths, labels, classes)
    if listing.empty_classes:
        logger.warning(
            "--source '%s': %d of %d classes have no images, first: %s",
            shown,
            len(listing.empty_classes),
            len(classes),
            classes[listing.empty_classes[0]],
        )
    prefix = len(f"{folder}/") if folder else 0  # keys are WNID/NAME in every layout
    return replace(listing, items=[i._replace(key=i.key[prefix:]) for i in listing.items])


def read_synsets(file: str) -> list[str]:
    """WNIDs in the order of the file: the first word of each line. Raises ``UserError``."""
    shown = redact(file)
    filesystem, path = open_url(file, what="--synsets")
    try:
        text = read_bytes(filesystem, path).decode()
    except FileNotFoundError:
        raise UserError(f"--synsets '{shown}': there is no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"--synsets '{shown}': is not a text file") from None
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        word = line.split()[0]
        if not WNID.fullmatch(word):
            raise UserError(
                f"--synsets '{shown}', line {number}: '{short_name(word)}' is not a WNID"
            )
        if word in lines:
            raise UserError(
                f"--synsets '{shown}', line {number}: {word} is in line {lines[word]}, too; name "
                "each class once"
            )
        lines[word] = number
    if list(lines) != sorted(lines):
        logger.warning(
            "--synsets '%s' is not sorted: class numbers follow the list, and differ from those of "
            "models trained on sorted WNIDs",
            shown,
        )
    return list(lines)


def _check_unpacked(found: Sequence[str], folder: str, present: Sequence[str], shown: str) -> None:
    """Raises ``UserError`` for the tar of a class that was not unpacked: without it, the classes
    would be numbered as if it did not exist."""
    for path in found:
        name = path[len(folder) :].lstrip("/")
        wnid, _, suffix = name.partition(".")
        if suffix == "tar" and WNID.fullmatch(wnid) and wnid not in present:
            raise UserError(
                f"--source '{shown}': {path} is not unpacked: make a folder {wnid} of it"
            )


def _train_folder(source: str) -> str:
    filesystem, root = open_url(source, what="--source")
    for folder in TRAIN_FOLDERS[:-1]:
        if exists(filesystem, f"{root}/{folder}"):
            return folder
    return ""


def _wnid(path: str, folder: str) -> str:
    return path[len(folder) :].lstrip("/").split("/", 1)[0] if "/" in path else ""
