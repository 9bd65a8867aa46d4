"""The numbered order of a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class ImageItem(NamedTuple):
    """One image before it is read."""

    key: str
    """Unique in its data set; WebDataset's sample key, so without dots."""
    label: int
    path: str
    """File below the source."""
    offset: int = 0
    """Where the image begins in the file, bytes."""
    length: int | None = None
    """Its length in bytes; None: to the end."""
    latent: str | None = None
    """File of its latent below the source, where the data set brings latents."""


@dataclass(frozen=True)
class Listing:
    """All images of a data set in their final order."""

    items: Sequence[ImageItem]
    num_classes: int

    def shuffled(self, seed: int) -> Listing:
        """One fixed permutation: sources list class after class, and a shard of one class would
        leave the trainer's shuffle window nothing to mix."""
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(self.items))
        return Listing([self.items[i] for i in order], self.num_classes)

    def fingerprint(self) -> str:
        """SHA-256 of every (key, label) in order: two listings that agree make the same store."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.key}\t{item.label}\n".encode())
        return digest.hexdigest()
