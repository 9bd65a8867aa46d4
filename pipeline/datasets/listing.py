"""The listing of a data set: its images in a fixed order."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from schemas.errors import UserError
from schemas.fields import MAX_CLASSES
from schemas.store import CaptionCounts

logger = logging.getLogger(__name__)


class ImageItem(NamedTuple):
    """Key, label and location of one image."""

    key: str
    """Unique in its data set; without dots, because it is WebDataset's sample key."""
    label: int
    path: str
    """Path of the file below the source."""
    offset: int = 0
    """First byte of the image in the file."""
    length: int | None = None
    """Length in bytes; None: to the end of the file."""
    latent: str | None = None
    """Path of the latent's file below the source, in data sets with latents."""
    captions: tuple[str, ...] = ()
    """Its captions, in data sets with captions."""
    contexts: tuple[str, ...] = ()
    """Paths of its captions' embeddings below the source, in data sets with embeddings."""


def describe_image(dataset: str, key: str, path: str) -> str:
    """An image in messages: its path, and in tars, which hold many, the key of its sample too."""
    if dataset != "webdataset":
        return path
    return f"{path}: sample '{key}'" if path else f"sample '{key}'"


@dataclass(frozen=True)
class Listing:
    """All images of a data set in their final order."""

    items: Sequence[ImageItem]
    num_classes: int
    class_names: tuple[str, ...] = ()
    """Names in the order of class numbers; empty where the source has numbers only."""
    empty_classes: tuple[int, ...] = ()
    """Numbers of classes without images."""
    captions: CaptionCounts | None = None
    """Captions found and left out, in data sets with captions."""

    def shuffled(self, seed: int) -> Listing:
        """A fixed permutation, because sources list class after class and the trainer's shuffle
        window could not mix shards of one class."""
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(self.items))
        return replace(self, items=[self.items[i] for i in order])

    def fingerprint(self) -> str:
        """SHA-256 of all (key, label) in order; equal listings give the same store."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.key}\t{item.label}\n".encode())
        return digest.hexdigest()

    def captions_sha256(self) -> str:
        """SHA-256 of every key and its captions in order, or the names of their embeddings."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps([item.key, item.captions, item.contexts]).encode())
        return digest.hexdigest()


def numbered_listing(items: Sequence[ImageItem], shown: str) -> Listing:
    """The listing of a source that numbers its classes itself, up to the largest label. Numbers
    without images stay classes, because sources are often parts of larger ones. ``shown`` is the
    redacted source."""
    labels = {item.label for item in items}
    count = max(labels) + 1
    # labels are untrusted: ``check_listing`` refuses a number that would fill the memory
    numbers = range(count) if count <= MAX_CLASSES else ()
    empty = tuple(n for n in numbers if n not in labels)
    if empty:
        named = ", ".join(str(n) for n in empty[:4]) + (", ..." if len(empty) > 4 else "")
        logger.warning(
            "'%s': %d of %d class numbers have no images (%s)", shown, len(empty), count, named
        )
    return Listing(items, count, empty_classes=empty)


def with_names(listing: Listing, names: Sequence[str], shown: str) -> Listing:
    """A numbered listing with all classes of a list, the source's and others. Raises ``UserError``
    if the list is too short."""
    if listing.num_classes > len(names):
        raise UserError(
            f"'{shown}' has an image of class {listing.num_classes - 1}; --synsets has classes 0 "
            f"to {len(names) - 1}"
        )
    more = range(listing.num_classes, len(names))
    empty = (*listing.empty_classes, *more)
    return replace(listing, num_classes=len(names), class_names=tuple(names), empty_classes=empty)
