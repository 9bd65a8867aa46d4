"""Data sets with one folder for each class, and the listing of files below a source."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence

from pipeline.datasets.listing import ImageItem, Listing
from pipeline.datasets.listing_check import short_name
from pipeline.storage.files import (
    MAX_NAMED,
    is_local,
    list_folders,
    list_source,
    open_url,
    redact,
)
from pipeline.storage.redaction import without_secrets
from schemas.errors import UserError, plain_text

logger = logging.getLogger(__name__)

_reported: set[tuple[str, tuple[str, ...]]] = set()


def list_class_folders(source: str, *, allow_empty: bool = False) -> Listing:
    """List ``source/CLASS/**/FILE``; the label is the rank of CLASS among the sorted class folders.
    Hidden files and folders are ignored, and files directly in ``source``.

    A class folder without files is an error, or with ``allow_empty`` a class without images,
    because the numbers of later classes must not depend on it. Raises ``UserError``.
    """
    found = list_files(source)
    paths = [path for path in found if "/" in path]
    if not paths:
        raise UserError(f"--source '{redact(source)}' has no images: expected CLASS/FILE")
    report_ignored(source, [path for path in found if "/" not in path])
    labels = [path.split("/", 1)[0] for path in paths]
    classes = sorted({*list_class_names(source), *labels})
    if not allow_empty:
        require_images(source, sorted(set(classes) - set(labels)))
    return make_listing(paths, labels, classes)


def list_unlabelled(source: str) -> Listing:
    """List every file below ``source``, except hidden ones, as of one class with the name of the
    source. Raises ``UserError``."""
    paths = list_files(source)
    if not paths:
        raise UserError(f"--source '{redact(source)}' has no images")
    name = redact(source).rstrip("/").rpartition("/")[2] or "images"
    return make_listing(paths, [name] * len(paths), [name])


def list_class_names(source: str, below: str = "") -> list[str]:
    """Sorted names of the folders directly in ``source/below``, except hidden ones, also of those
    without files. Raises ``UserError``."""
    filesystem, root = open_url(source, what="--source")
    try:
        names = list_folders(filesystem, f"{root}/{below}".rstrip("/"))
    except Exception as error:  # fsspec backends raise other types than StorageError, too
        raise _unreadable(source, error) from None
    return [name for name in names if not name.startswith(".")]


def list_files(source: str, below: str = "") -> list[str]:
    """Sorted paths of all files below ``source/below``, relative to ``source``, except hidden ones.

    Files of all suffixes are listed; one that is not an image is reported when it is read. Raises
    ``UserError``, also for links that lead nowhere.
    """
    filesystem, root = open_url(source, what="--source")
    folder = f"{root}/{below}".rstrip("/")
    try:
        # Object stores list a single file as its own tree; local filesystems do not.
        if is_local(filesystem) and os.path.isfile(folder):
            return [below]
        found = list_source(filesystem, folder)
    except Exception as error:  # fsspec backends raise other types than StorageError, too
        raise _unreadable(source, error) from None
    return [f"{below}/{path}" for path in found] if below else found


def _unreadable(source: str, error: Exception) -> UserError:
    reason = plain_text(without_secrets(str(error), source)) or type(error).__name__
    return UserError(f"--source '{redact(source)}': {reason}")


def report_ignored(source: str, paths: Sequence[str]) -> None:
    """Log the files of a source that are in no class folder, once for each command."""
    known = (source, tuple(paths))
    if paths and known not in _reported:
        _reported.add(known)
        logger.warning(
            "--source '%s': ignored %d files that are in no class folder, first: %s",
            redact(source),
            len(paths),
            short_name(paths[0]),
        )


def require_images(source: str, empty: Sequence[str]) -> None:
    """Raises ``UserError`` naming class folders without images."""
    if empty:
        named = ", ".join(f"'{short_name(name)}'" for name in empty[:MAX_NAMED])
        more = f" and {len(empty) - MAX_NAMED} more" if len(empty) > MAX_NAMED else ""
        raise UserError(
            f"--source '{redact(source)}': no images in class folder {named}{more}; add images, "
            "remove it (which changes the numbers of later classes), or keep it as a class "
            "without images with --allow-empty-classes"
        )


def make_listing(paths: Sequence[str], names: Sequence[str], classes: Sequence[str]) -> Listing:
    """The listing of files and the names of their classes; the label is the position of the name
    in ``classes``."""
    rank = {name: i for i, name in enumerate(classes)}
    labels = [rank[name] for name in names]
    empty = sorted(set(rank.values()) - set(labels))
    return Listing(make_items(paths, labels), len(classes), tuple(classes), tuple(empty))


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
