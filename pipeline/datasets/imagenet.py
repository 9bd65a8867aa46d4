"""ImageNet-1k in its distributed layouts: train/WNID/*.JPEG, or Kaggle's ILSVRC tree."""

from __future__ import annotations

import re

from pipeline.datasets.folder import list_files, make_items
from pipeline.datasets.listing import Listing
from pipeline.storage.files import exists, open_url, read_bytes, redact
from schemas.errors import UserError

WNID = re.compile(r"n\d{8}")
TRAIN_FOLDERS = ("ILSVRC/Data/CLS-LOC/train", "train", "")


def list_imagenet(source: str, synsets: str | None) -> Listing:
    """List all training images; the label is the rank of the WNID in sorted order.

    The WNIDs are those of the file ``synsets``, which may have classes that the source lacks, else
    those of the source. Raises ``UserError``.
    """
    shown, shown_synsets = redact(source), redact(synsets or "")
    folder = _train_folder(source)
    paths = [path for path in list_files(source, folder) if WNID.fullmatch(_wnid(path, folder))]
    if not paths:
        raise UserError(
            f"--source '{shown}' has no ImageNet training images: expected train/WNID/*.JPEG or "
            "ILSVRC/Data/CLS-LOC/train/WNID/*.JPEG"
        )
    present = sorted({_wnid(path, folder) for path in paths})
    classes = read_synsets(synsets) if synsets else present
    missing = sorted(set(present) - set(classes))
    if missing:
        raise UserError(f"--synsets '{shown_synsets}' lacks {missing[0]}, a class of '{shown}'")
    rank = {wnid: i for i, wnid in enumerate(classes)}
    labels = [rank[_wnid(path, folder)] for path in paths]
    items = make_items(paths, labels)
    prefix = len(f"{folder}/") if folder else 0  # keys are WNID/NAME in every layout
    return Listing(
        [item._replace(key=item.key[prefix:]) for item in items], num_classes=len(classes)
    )


def read_synsets(file: str) -> list[str]:
    """Sorted WNIDs: the first word of each line. Raises ``UserError``."""
    filesystem, path = open_url(file, what="--synsets")
    try:
        text = read_bytes(filesystem, path).decode()
    except FileNotFoundError:
        raise UserError(f"--synsets '{redact(file)}': there is no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"--synsets '{redact(file)}': is not a text file") from None
    words = [line.split()[0] for line in text.splitlines() if line.strip()]
    for number, word in enumerate(words, start=1):
        if not WNID.fullmatch(word):
            raise UserError(f"--synsets '{redact(file)}', line {number}: '{word}' is not a WNID")
    return sorted(set(words))


def _train_folder(source: str) -> str:
    filesystem, root = open_url(source, what="--source")
    for folder in TRAIN_FOLDERS[:-1]:
        if exists(filesystem, f"{root}/{folder}"):
            return folder
    return ""


def _wnid(path: str, folder: str) -> str:
    return path[len(folder) :].lstrip("/").split("/", 1)[0] if "/" in path else ""
