"""Images to evaluate: from an .npz, a folder of images or a store, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluate.images.folder import FolderImages
from pipeline.evaluate.images.sample_info import parse_sample_info
from pipeline.evaluate.images.store import StoreImages
from pipeline.storage.files import is_local, open_url, redact
from pipeline.storage.npz import CAPTIONS, Archive, read_about
from pipeline.store import Store
from schemas.errors import UserError
from schemas.sample import SampleAbout

IMAGES = "arr_0"
"""Name of the images in ADM's .npz files: numpy's name for the first unnamed array."""
MAX_PIXELS = 1 << 24
"""Pixels of one image in an .npz: 4096 x 4096, 48 MiB."""
MAX_CAPTIONS = 1 << 32
"""Bytes of the captions in an .npz."""


class Images(Protocol):
    """A set of images, all of one size."""

    count: int
    """Number of images that ``batches`` yields."""
    kind: str
    """Description of their origin, for people and files."""
    info: SampleAbout | None
    """Description of samples that ``jobs/sample.py`` drew."""

    def captions(self) -> Sequence[str] | None:
        """The caption of each image; None where there are none."""
        ...

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W) with B at most ``size``, and fewer images where a batch would exceed
        256 MiB. Raises ``UserError``."""
        ...


def open_images(
    place: str,
    option: str,
    *,
    limit: int | None = None,
    resolution: int | None = None,
    autoencoder: str | None = None,
    device: torch.device | str = "cpu",
) -> Images:
    """The first ``limit`` images at a path or fsspec URL. For ``resolution`` see ``FolderImages``,
    for ``autoencoder`` see ``StoreImages``. Raises ``UserError`` naming ``option``."""
    if place.endswith(".npz"):
        return ArchiveImages(Archive(place, option), limit=limit)
    try:
        if Store.exists(place):
            return StoreImages(place, limit=limit, autoencoder=autoencoder, device=device)
    except UserError as error:  # the message names the option of other commands
        raise UserError(str(error).replace("--store", option, 1)) from None
    filesystem, path = open_url(place, what=option)
    shown = redact(place)
    if is_local(filesystem) and not filesystem.isdir(path):
        found = "is a file" if filesystem.exists(path) else "does not exist"
        raise UserError(
            f"{option} '{shown}' {found}; expected an .npz, a folder of images or a store"
        )
    return FolderImages(place, option, limit=limit, resolution=resolution)


class ArchiveImages:
    """The array ``arr_0`` of an .npz: uint8 (N, H, W, 3)."""

    def __init__(self, archive: Archive, *, limit: int | None = None) -> None:
        self._archive = archive
        if IMAGES not in archive:
            names = ", ".join(archive.names)[:200]
            raise UserError(
                f"{archive.where} holds no images: expected '{IMAGES}', uint8 (N, H, W, 3), found: "
                f"{names or 'nothing'}"
            )
        shape, dtype, *_ = archive.header(IMAGES)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise UserError(
                f"{archive.where}: '{IMAGES}' is {dtype} {shape}; images are uint8 (N, H, W, 3)"
            )
        if not 0 < shape[1] * shape[2] <= MAX_PIXELS:
            raise UserError(
                f"{archive.where}: '{IMAGES}' has images of {shape[2]}x{shape[1]} pixels; expected "
                f"at least 1 pixel and at most {MAX_PIXELS}: scale the images"
            )
        self.count = shape[0] if limit is None else min(limit, shape[0])
        self.kind = f"{shape[2]}x{shape[1]} images of an .npz"
        self.info = parse_sample_info(read_about(archive), archive.where)

    def captions(self) -> Sequence[str] | None:
        if CAPTIONS not in self._archive:
            return None
        header = self._archive.header(CAPTIONS)
        if header.dtype.kind != "U" or header.shape != self._archive.header(IMAGES).shape[:1]:
            raise UserError(
                f"{self._archive.where}: '{CAPTIONS}' is {header.dtype} {header.shape}; expected "
                "a text for each image"
            )
        texts: list[str] = self._archive.array(CAPTIONS, MAX_CAPTIONS).tolist()
        return texts[: self.count]

    def batches(self, size: int) -> Iterator[Tensor]:
        for block in self._archive.blocks(IMAGES, size, self.count):
            yield torch.from_numpy(block).permute(0, 3, 1, 2)
