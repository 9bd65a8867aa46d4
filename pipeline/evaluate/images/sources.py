"""Images to evaluate: of an .npz, a folder of pictures or a store, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluate.images.folder import FolderImages
from pipeline.evaluate.images.sample_info import parse_or_none
from pipeline.evaluate.images.store import StoreImages
from pipeline.storage.files import is_local, open_url, redact
from pipeline.storage.npz import Archive, read_about
from pipeline.store import Store
from schemas.errors import UserError
from schemas.sample import SampleAbout

IMAGES = "arr_0"
"""ADM's name for the images of an .npz: what numpy calls the first array without one."""
MAX_PIXELS = 1 << 24
"""Of one image of an .npz, 4096 x 4096: 48 MiB."""


class Images(Protocol):
    """A set of images, all of one size."""

    count: int
    """How many there are, or are taken."""
    kind: str
    """What they are, for people and files."""
    about: SampleAbout | None
    """What samples of ours say of themselves."""

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W), B at most ``size``, and fewer where images are so large that these
        would be more than 256 MiB. Raises ``UserError``."""
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
    """The images at a path or fsspec URL; the first ``limit`` of them. ``resolution``: see
    ``FolderImages``; ``autoencoder``: see ``StoreImages``. Raises ``UserError`` naming
    ``option``."""
    if place.endswith(".npz"):
        return ArchiveImages(Archive(place, option), limit=limit)
    try:
        if Store.exists(place):
            return StoreImages(place, limit=limit, autoencoder=autoencoder, device=device)
    except UserError as error:  # the store is another command's option
        raise UserError(str(error).replace("--store", option, 1)) from None
    filesystem, path = open_url(place, what=option)
    shown = redact(place)
    if is_local(filesystem) and not filesystem.isdir(path):
        found = "is a file" if filesystem.exists(path) else "does not exist"
        raise UserError(
            f"{option} '{shown}' {found}; expected an .npz, a folder of pictures or a store"
        )
    return FolderImages(place, option, limit=limit, resolution=resolution)


class ArchiveImages:
    """``arr_0`` of an .npz: uint8 (N, H, W, 3)."""

    def __init__(self, archive: Archive, *, limit: int | None = None) -> None:
        self._archive = archive
        if IMAGES not in archive:
            held = ", ".join(archive.names)[:200]
            raise UserError(
                f"{archive.where} holds no images: expected '{IMAGES}', uint8 (N, H, W, 3), found: "
                f"{held or 'nothing'}"
            )
        shape, dtype, *_ = archive.header(IMAGES)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise UserError(
                f"{archive.where}: '{IMAGES}' is {dtype} {shape}; images are uint8 (N, H, W, 3)"
            )
        if not 0 < shape[1] * shape[2] <= MAX_PIXELS:
            raise UserError(
                f"{archive.where}: '{IMAGES}' has images of {shape[2]}x{shape[1]} pixels; there "
                f"must be some, and {MAX_PIXELS} at most: scale them down"
            )
        self.count = shape[0] if limit is None else min(limit, shape[0])
        self.kind = f"{shape[2]}x{shape[1]} images of an .npz"
        self.about = parse_or_none(read_about(archive), archive.where)

    def batches(self, size: int) -> Iterator[Tensor]:
        for block in self._archive.blocks(IMAGES, size, self.count):
            yield torch.from_numpy(block).permute(0, 3, 1, 2)
