"""Pictures in a folder."""

from __future__ import annotations

import io
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pipeline.datasets.crop import BadImageError, decode_crop, to_rgb
from pipeline.datasets.listing import ImageItem, Listing
from pipeline.datasets.reader import FileReader
from pipeline.evaluate.images.sample_info import about_folder
from pipeline.storage.files import list_tree, open_url, redact
from pipeline.storage.npz import fitting_rows
from pipeline.storage.redaction import without_secrets
from schemas.errors import UserError
from schemas.sample import ABOUT_FILE, LABELS_FILE, SampleAbout

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}
THREADS = 8
AHEAD = 256
"""Pictures being decoded before they are wanted; they are in memory together, large ones fewer."""


class FolderImages:
    """Every picture at any depth of a folder or fsspec URL, in a fixed shuffled order: consecutive
    ones are of all classes, so that the first few, or a tenth, stand for the whole."""

    def __init__(
        self, place: str, option: str, *, limit: int | None = None, resolution: int | None = None
    ) -> None:
        """``resolution``: cut out centre squares of so many pixels as ADM does; without it the
        pictures must be of one size. Raises ``UserError``."""
        self._where = f"{option} '{redact(place)}'"
        self._resolution = resolution
        filesystem, root = open_url(place, what=option)
        try:
            tree = list_tree(filesystem, root)
        except UserError:
            raise
        except Exception as error:  # fsspec backends raise their own types
            reason = " ".join(without_secrets(str(error), place).split())[:200]
            raise UserError(f"{self._where} cannot be listed: {reason}") from None
        names = sorted(str(path)[len(root) :].lstrip("/") for path in tree)
        names = [name for name in names if not any(p.startswith(".") for p in name.split("/"))]
        pictures = [name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES]
        if not pictures:
            raise UserError(
                f"{self._where} holds no pictures (.png, .jpg, ...): expected an .npz, a folder of "
                "pictures or a store"
            )
        self.about: SampleAbout | None = None
        if ABOUT_FILE in names:
            self.about = about_folder(filesystem, root, self._where)
        ours = {ABOUT_FILE, LABELS_FILE} if self.about is not None else set()
        others = len(set(names) - set(pictures) - ours)
        if others:
            print(f"{self._where}: {others} files that are no pictures left out", file=sys.stderr)
        listing = Listing([ImageItem(name, 0, name) for name in pictures], 1).shuffled(0)
        self._items = list(listing.items)[:limit]
        self._read = FileReader(place)
        self.count = len(self._items)
        if resolution is None:
            first = self._decode(self._items[0], None)
            self._size: tuple[int, int] | None = (first.shape[1], first.shape[0])
        else:
            self._size = None
        width, height = self._size or (resolution or 0, resolution or 0)
        self._bytes = 3 * width * height
        self.kind = f"{width}x{height} pictures of a folder"

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W), B as of every ``Images``. Raises ``UserError`` naming a picture that
        cannot be used."""
        size, ahead = (fitting_rows(count, self._bytes) for count in (size, AHEAD))
        block: list[np.ndarray] = []
        with ThreadPoolExecutor(THREADS) as pool:
            waiting: deque[Future[np.ndarray]] = deque()
            try:
                for number in range(self.count + ahead):
                    if number < self.count:
                        item = self._items[number]
                        waiting.append(pool.submit(self._decode, item, self._size))
                    if waiting and (number >= self.count or len(waiting) > ahead):
                        block.append(waiting.popleft().result())
                    if len(block) == size:
                        yield _as_batch(block)
                        block = []
            finally:
                for future in waiting:
                    future.cancel()
        if block:
            yield _as_batch(block)

    def _decode(self, item: ImageItem, size: tuple[int, int] | None) -> np.ndarray:
        """uint8 (H, W, 3)."""
        try:
            data = self._read(item)
            if self._resolution is not None:
                return decode_crop(data, self._resolution)
            image = Image.open(io.BytesIO(data))
            if size is not None and image.size != size:
                raise UserError(
                    f"{self._where}: {item.path} has {image.width}x{image.height} pixels, others "
                    f"{size[0]}x{size[1]}; --resolution N cuts centre squares of one size"
                )
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise BadImageError(f"{image.width}x{image.height} pixels, the limit is {limit}")
            return np.asarray(to_rgb(image))
        except (UserError, MemoryError):
            raise
        except UnidentifiedImageError:
            raise UserError(f"{self._where}: {item.path}: not an image") from None
        except Exception as error:  # Pillow's decoders raise a zoo of types on damaged input
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self._where}: {item.path}: {reason}") from None


def _as_batch(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
