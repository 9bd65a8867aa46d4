"""One folder per class, at any depth below the source."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from pipeline.datasets.listing import ImageItem, Listing
from pipeline.storage.files import is_local, list_tree, open_url, redact
from pipeline.storage.redaction import without_secrets
from schemas.errors import UserError


def list_class_folders(source: str) -> Listing:
    """``source/CLASS/**/FILE``; the label is the rank of CLASS among the sorted class folders."""
    paths = [path for path in list_files(source) if "/" in path]
    if not paths:
        raise UserError(f"--source '{redact(source)}' holds no images: expected CLASS/FILE")
    classes = sorted({path.split("/", 1)[0] for path in paths})
    rank = {name: i for i, name in enumerate(classes)}
    labels = [rank[path.split("/", 1)[0]] for path in paths]
    return Listing(make_items(paths, labels), num_classes=len(classes))


def list_files(source: str, below: str = "") -> list[str]:
    """Sorted paths of all files below ``source/below``, relative to ``source``, hidden ones not.

    Every file counts, whatever its suffix: one that is no image is reported when it is read.
    """
    filesystem, root = open_url(source, what="--source")
    folder = f"{root}/{below}".rstrip("/")
    try:
        # object stores list a single file as its own tree
        alone = is_local(filesystem) and os.path.isfile(folder)
        found = [folder] if alone else list(list_tree(filesystem, folder))
    except Exception as error:  # fsspec backends raise their own types beside StorageError
        reason = " ".join(without_secrets(str(error), source).split()) or type(error).__name__
        raise UserError(f"--source '{redact(source)}': {reason}") from None
    relative = (str(path)[len(root) :].lstrip("/") for path in found)
    return sorted(
        path for path in relative if not any(part.startswith(".") for part in path.split("/"))
    )


def make_items(paths: Sequence[str], labels: Sequence[int]) -> list[ImageItem]:
    """Keys are paths without suffix; files that share one (``a.jpg``, ``a.png``) keep theirs."""
    stems = [_stem(path) for path in paths]
    shared = {stem for stem, count in Counter(stems).items() if count > 1}
    shared |= set(stems) & set(paths)  # the stem of a.jpg.jpg is a.jpg
    return [
        ImageItem(escape_dots(path if stem in shared else stem), label, path)
        for path, stem, label in zip(paths, stems, labels, strict=True)
    ]


def escape_dots(name: str) -> str:
    """WebDataset ends a key at the first dot of the file name, so a key must not hold any."""
    return name.replace("%", "%25").replace(".", "%2E")


def _stem(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rsplit(".", 1)[0] or name)
