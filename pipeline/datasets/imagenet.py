"""ImageNet-1k as it is distributed: train/WNID/*.JPEG, or Kaggle's ILSVRC tree."""

from __future__ import annotations

import re

import fsspec

from pipeline.datasets.base import Listing
from pipeline.datasets.folder import list_files, make_items
from pipeline.files import exists, open_url, without_credentials
from schemas.errors import UserError

WNID = re.compile(r"n\d{8}")
TRAIN_FOLDERS = ("ILSVRC/Data/CLS-LOC/train", "train", "")


def list_imagenet(source: str, synsets: str | None) -> Listing:
    """All training images; the label is the rank of the WNID in sorted order.

    ``synsets`` (a file of WNIDs) fixes the ranks, also of classes that the source lacks.
    """
    shown = without_credentials(source)
    folder = _train_folder(source)
    paths = [path for path in list_files(source, folder) if WNID.fullmatch(_wnid(path, folder))]
    if not paths:
        raise UserError(
            f"--source '{shown}' holds no ImageNet training images: expected train/WNID/*.JPEG or "
            "ILSVRC/Data/CLS-LOC/train/WNID/*.JPEG"
        )
    present = sorted({_wnid(path, folder) for path in paths})
    classes = read_synsets(synsets) if synsets else present
    missing = sorted(set(present) - set(classes))
    if missing:
        raise UserError(f"--synsets '{synsets}' lacks {missing[0]}, which '{shown}' holds")
    rank = {wnid: i for i, wnid in enumerate(classes)}
    labels = [rank[_wnid(path, folder)] for path in paths]
    items = make_items(paths, labels)
    cut = len(f"{folder}/") if folder else 0  # keys read WNID/NAME in either tree
    return Listing([item._replace(key=item.key[cut:]) for item in items], num_classes=len(classes))


def read_synsets(file: str) -> list[str]:
    """Sorted WNIDs: the first word of each line."""
    try:
        with fsspec.open(file, "rt") as handle:
            words = [line.split()[0] for line in handle.read().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"--synsets '{file}': {error}") from None
    for number, word in enumerate(words, start=1):
        if not WNID.fullmatch(word):
            raise UserError(f"--synsets '{file}', line {number}: '{word}' is not a WNID")
    return sorted(set(words))


def _train_folder(source: str) -> str:
    filesystem, root = open_url(source, what="--source")
    for folder in TRAIN_FOLDERS[:-1]:
        if exists(filesystem, f"{root}/{folder}"):
            return folder
    return ""


def _wnid(path: str, folder: str) -> str:
    return path[len(folder) :].lstrip("/").split("/", 1)[0] if "/" in path else ""
