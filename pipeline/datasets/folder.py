"""Data sets with one folder for each class, and the listing of files below a source."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from pipeline.datasets.listing import ImageItem, Listing
from pipeline.storage.files import is_local, list_tree, open_url, redact
from pipeline.storage.redaction import without_secrets
from schemas.errors import UserError, plain_text


def list_class_folders(source: str) -> Listing:
    """List ``source/CLASS/**/FILE``; the label is the rank of CLASS among the sorted class folders.
    Raises ``UserError``."""
    paths = [path for path in list_files(source) if "/" in path]
    if not paths:
        raise UserError(f"--source '{redact(source)}' has no images: expected CLASS/FILE")
    classes = sorted({path.split("/", 1)[0] for path in paths})
    rank = {name: i for i, name in enumerate(classes)}
    labels = [rank[path.split("/", 1)[0]] for path in paths]
    return Listing(make_items(paths, labels), num_classes=len(classes))


def list_files(source: str, below: str = "") -> list[str]:
    """Sorted paths of all files below ``source/below``, relative to ``source``, except hidden ones.

    Files of all suffixes are listed; one that is not an image is reported when it is read. Raises
    ``UserError``.
    """
    filesystem, root = open_url(source, what="--source")
    folder = f"{root}/{below}".rstrip("/")
    try:
        # Object stores list a single file as its own tree; local filesystems do not.
        single_file = is_local(filesystem) and os.path.isfile(folder)
        found = [folder] if single_file else list(list_tree(filesystem, folder))
    except Exception as error:  # fsspec backends raise other types than StorageError, too
        reason = plain_text(without_secrets(str(error), source)) or type(error).__name__
        raise UserError(f"--source '{redact(source)}': {reason}") from None
    relative = (str(path)[len(root) :].lstrip("/") for path in found)
    return sorted(
        path for path in relative if not any(part.startswith(".") for part in path.split("/"))
    )


def make_items(paths: Sequence[str], labels: Sequence[int]) -> list[ImageItem]:
    """Items whose keys are paths without suffix, or with it where several files would have the same
    key (``a.jpg``, ``a.png``)."""
    stems = [_stem(path) for path in paths]
    ambiguous = {stem for stem, count in Counter(stems).items() if count > 1}
    ambiguous |= set(stems) & set(paths)  # the stem of a.jpg.jpg is a.jpg
    return [
        ImageItem(escape_dots(path if stem in ambiguous else stem), label, path)
        for path, stem, label in zip(paths, stems, labels, strict=True)
    ]


def escape_dots(name: str) -> str:
    """Replace dots, because WebDataset ends a key at the first dot of the file name."""
    return name.replace("%", "%25").replace(".", "%2E")


def _stem(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rsplit(".", 1)[0] or name)
