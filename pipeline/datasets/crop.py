"""Decode an image to the square uint8 crop that is the input of teacher and autoencoder."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from schemas.errors import plain_text

# Pillow warns at its pixel limit and raises at twice the limit; here the limit is an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImageError(Exception):
    """An image that cannot be used; the message has the reason."""


def decode_crop(data: bytes, resolution: int, *, cropped: bool = False) -> np.ndarray:
    """Decode and centre-crop: uint8 (resolution, resolution, 3). Raises ``BadImageError``; with
    ``cropped`` also if the image does not have this resolution already."""
    try:
        image = Image.open(io.BytesIO(data))
        if cropped and image.size != (resolution, resolution):
            raise BadImageError(
                f"{image.width}x{image.height} pixels; its latent is of these pixels: expected "
                f"{resolution}x{resolution}, or another --resolution"
            )
        limit = Image.MAX_IMAGE_PIXELS
        # A thin strip of few pixels has very many after its short side is resized to the crop's.
        scale = max(1.0, resolution / min(image.size))
        if limit is not None and image.width * image.height * scale * scale > limit:
            raise BadImageError(f"{image.width}x{image.height} pixels, the limit is {limit}")
        return center_crop(to_rgb(image), resolution)
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image") from None
    except Exception as error:  # Pillow's decoders raise many types for damaged input
        raise BadImageError(plain_text(str(error)) or type(error).__name__) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. 16-bit greys are scaled; Pillow's own conversion would clip them."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    return image.convert("RGB")


def center_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """The centre crop of ADM (arXiv 2105.05233), as HASTE, REPA, SiT and DiT prepare ImageNet.

    The image is halved with a box filter while its short side is at least twice ``resolution``;
    then the short side is resized to ``resolution`` bicubically and the centre is cut out: uint8
    (resolution, resolution, 3).
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    array = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top = (array.shape[0] - resolution) // 2
    left = (array.shape[1] - resolution) // 2
    return np.ascontiguousarray(array[top : top + resolution, left : left + resolution])
