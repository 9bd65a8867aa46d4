"""Decode an image to the square uint8 crop that is the input of teacher and autoencoder."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from schemas.errors import plain_text
from schemas.extract import Crop

# Pillow warns at its pixel limit and raises at twice the limit; here the limit is an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

GREY_16_FORMATS = {"PNG", "TIFF", "JPEG2000", "IM", None}
"""Formats whose greys of mode I;16 are unsigned (FITS has signed ones with an offset); None: not
from a file."""
SIGNED = 2
"""TIFF's number for signed samples."""


class BadImageError(Exception):
    """An image that cannot be used; the message has the reason."""


def decode_crop(
    data: bytes, resolution: int, *, cropped: bool = False, crop: Crop = "adm"
) -> np.ndarray:
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
        return CROPS[crop](to_rgb(image), resolution)
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image") from None
    except Exception as error:  # Pillow's decoders raise many types for damaged input
        raise BadImageError(plain_text(str(error)) or type(error).__name__) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode. Raises ``BadImageError`` where its values have no known
    range: floats, and integers that are signed or of 32 bits.

    8-bit modes are converted by Pillow as they are for ADM: alpha is dropped, not blended with a
    background; colour profiles are ignored; of several frames the first is taken. Greys of 9 to 16
    bits are reduced to their upper 8 bits, as Pillow does with 16-bit colours; its own conversion
    of greys would clip them.
    """
    image.load()  # some formats know their mode only now
    problem = _unknown_range(image)
    if problem is not None:
        raise BadImageError(f"{problem}; convert it to 8 or 16 bits without sign")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.uint32) >> (_grey_bits(image) - 8)
        # Pillow inverts such TIFFs of 8 bits, but not of 16.
        inverted = _tiff_tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        image = Image.fromarray((255 - grey if inverted else grey).astype(np.uint8))
    elif image.mode == "La":  # premultiplied; Pillow has no direct conversion
        image = image.convert("LA")
    return image.convert("RGB")


def _unknown_range(image: Image.Image) -> str | None:
    """Reason why the values of an image cannot be scaled to 8 bits, None if they can."""
    if image.mode == "F" or str(getattr(image, "pixel_format", "")).startswith("BC6H"):
        return "has floating-point pixels, whose range is not known"
    if image.mode == "I" and image.format != "PPM":  # Pillow scales PGMs to 16 bits
        return "has 32-bit or signed integer pixels, whose range is not known"
    if image.mode.startswith("I;16") and image.format not in GREY_16_FORMATS:
        return f"is a 16-bit {image.format}, whose range is not known"
    if max(_tiff_tag(image, TiffImagePlugin.SAMPLEFORMAT) or (1,)) == SIGNED:
        return "has signed integer pixels, whose range is not known"
    colours = _tiff_tag(image, TiffImagePlugin.COLORMAP)
    if image.mode in {"P", "PA"} and colours and 0 < max(colours) < 256:
        return "has a palette of 8-bit numbers, where TIFF has 16-bit ones"
    return None


def _grey_bits(image: Image.Image) -> int:
    """Depth of an image in an integer mode of more than 8 bits."""
    return int((_tiff_tag(image, TiffImagePlugin.BITSPERSAMPLE) or (16,))[0])


def _tiff_tag(image: Image.Image, tag: int) -> Any:
    """Value of a TIFF's tag, None if it has none or the image is not a TIFF."""
    return image.tag_v2.get(tag) if isinstance(image, TiffImagePlugin.TiffImageFile) else None


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


def square_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """The centre square, resized with Lanczos, as U-ViT (arXiv 2209.12152), REPA and HASTE prepare
    MS-COCO: uint8 (resolution, resolution, 3)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.array(square.resize((resolution, resolution), Image.Resampling.LANCZOS))


CROPS: dict[Crop, Callable[[Image.Image, int], np.ndarray]] = {
    "adm": center_crop,
    "square_lanczos": square_crop,
}
