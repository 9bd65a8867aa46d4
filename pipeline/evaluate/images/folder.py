"""Image files in a folder."""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pipeline.datasets.captions import read_caption_lines
from pipeline.datasets.crop import BadImageError, decode_crop, to_rgb
from pipeline.datasets.listing import ImageItem, Listing
from pipeline.datasets.reader import FileReader
from pipeline.evaluate.images.sample_info import read_folder_info
from pipeline.storage.files import list_source, open_url, redact
from pipeline.storage.npz import fitting_rows
from pipeline.storage.redaction import without_secrets
from schemas.errors import UserError, plain_text
from schemas.sample import ABOUT_FILE, CAPTIONS_FILE, LABELS_FILE, SampleAbout

logger = logging.getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
THREADS = 8
MAX_DECODED_AHEAD = 256
"""Images in memory that are decoded before they are needed; fewer where images are large."""


class FolderImages:
    """All images below a folder or fsspec URL, in a fixed shuffled order, so that the first images,
    or one part of ten, are representative although a folder may be sorted by class."""

    def __init__(
        self, place: str, option: str, *, limit: int | None = None, resolution: int | None = None
    ) -> None:
        """``resolution`` is the side in pixels of the centre crop, as in ADM; without it all images
        must have the same size. Raises ``UserError``."""
        self._place, self._where = place, f"{option} '{redact(place)}'"
        self._resolution = resolution
        filesystem, root = open_url(place, what=option)
        try:
            names = list_source(filesystem, root)
        except UserError as error:
            raise UserError(f"{self._where}: {error}") from None
        except Exception as error:  # fsspec backends raise their own types
            reason = plain_text(without_secrets(str(error), place))[:200]
            raise UserError(f"{self._where} cannot be listed: {reason}") from None
        images = [name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES]
        if not images:
            raise UserError(
                f"{self._where} has no images (.png, .jpg, ...): expected an .npz, a folder of "
                "images or a store"
            )
        self.info: SampleAbout | None = None
        if ABOUT_FILE in names:
            self.info = read_folder_info(filesystem, root, self._where)
        known = {ABOUT_FILE, LABELS_FILE} if self.info is not None else set()
        known.add(CAPTIONS_FILE)
        others = len(set(names) - set(images) - known)
        if others:
            logger.warning("%s: skipped %d files that are not images", self._where, others)
        listing = Listing([ImageItem(name, 0, name) for name in images], 1).shuffled(0)
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

    def captions(self) -> Sequence[str] | None:
        """From captions.jsonl, the first of each image; its lines are those of ``--captions`` of an
        extraction, too. Raises ``UserError`` naming an image without one."""
        try:
            by_file = read_caption_lines(f"{self._place.rstrip('/')}/{CAPTIONS_FILE}")
        except FileNotFoundError:
            return None
        bare = next((item.path for item in self._items if not by_file.get(item.path)), None)
        if bare is not None:
            raise UserError(f"{self._where}: {CAPTIONS_FILE} has no caption of {bare}")
        return [by_file[item.path][0] for item in self._items]

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W), see ``Images``. Raises ``UserError`` naming an image that cannot be
        decoded."""
        size, ahead = (fitting_rows(count, self._bytes) for count in (size, MAX_DECODED_AHEAD))
        batch: list[np.ndarray] = []
        with ThreadPoolExecutor(THREADS) as pool:
            waiting: deque[Future[np.ndarray]] = deque()
            try:
                for number in range(self.count + ahead):
                    if number < self.count:
                        item = self._items[number]
                        waiting.append(pool.submit(self._decode, item, self._size))
                    if waiting and (number >= self.count or len(waiting) > ahead):
                        batch.append(waiting.popleft().result())
                    if len(batch) == size:
                        yield _stack(batch)
                        batch = []
            finally:
                for future in waiting:
                    future.cancel()
        if batch:
            yield _stack(batch)

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
                    f"{size[0]}x{size[1]}; --resolution N crops all images to one size"
                )
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise BadImageError(f"{image.width}x{image.height} pixels, the limit is {limit}")
            return np.asarray(to_rgb(image))
        except (UserError, MemoryError):
            raise
        except UnidentifiedImageError:
            raise UserError(f"{self._where}: {item.path}: not an image") from None
        except Exception as error:  # Pillow's decoders raise many types on damaged input
            reason = plain_text(str(error))[:200] or type(error).__name__
            raise UserError(f"{self._where}: {item.path}: {reason}") from None


def _stack(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
