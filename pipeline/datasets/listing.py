"""The listing of a data set: its images in a fixed order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


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

    def shuffled(self, seed: int) -> Listing:
        """A fixed permutation, because sources list class after class and the trainer's shuffle
        window could not mix shards of one class."""
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(self.items))
        return Listing([self.items[i] for i in order], self.num_classes)

    def fingerprint(self) -> str:
        """SHA-256 of all (key, label) in order; equal listings give the same store."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.key}\t{item.label}\n".encode())
        return digest.hexdigest()
