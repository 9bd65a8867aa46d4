"""scikit-learn's hand-written digits: 1,797 real images without a download.

They are the UCI "Optical Recognition of Handwritten Digits" test set: 8x8 pixels, 17 grey levels,
10 classes. The demo and the tests use them.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image

from pipeline.datasets.listing import ImageItem, Listing
from schemas.errors import UserError

MAX_GREY = 16  # brightest pixel value in the source


def digits_images(resolution: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """All digits in scikit-learn's order, bicubically resized to ``resolution``, as RGB.

    Returns uint8 images (N, R, R, 3) and int64 labels (N,), N = 1797, R = ``resolution``. Raises
    ``ValueError`` for a resolution below 1, ``ImportError`` without scikit-learn.
    """
    if resolution < 1:
        raise ValueError(f"the resolution of the digits must be positive, not {resolution}")
    grey, labels = _source_digits()
    size = (resolution, resolution)
    resized = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in grey]
    images = np.repeat(np.stack(resized)[..., None], 3, axis=-1)
    return images, labels


@functools.cache
def _source_digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (N, 8, 8) and int64 labels (N,). Raises ``ImportError``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits are part of scikit-learn, which is not installed: pip install '.[demo]'"
        ) from error
    source = load_digits()
    grey = np.rint(source.images * (255 / MAX_GREY)).astype(np.uint8)
    return grey, source.target.astype(np.int64)


def list_digits() -> Listing:
    """The digits as a data set of 10 classes. Raises ``UserError`` without scikit-learn."""
    try:
        _, labels = _source_digits()
    except ImportError as error:
        raise UserError(str(error)) from None
    items = [
        ImageItem(key=f"digit-{i:04d}", label=int(label), path=f"digit-{i:04d}.png")
        for i, label in enumerate(labels)
    ]
    return Listing(items, num_classes=10, class_names=tuple("0123456789"))


def read_digit(item: ImageItem) -> bytes:
    """One digit as a PNG of 8x8 pixels; ``decode_crop`` resizes it as ``digits_images`` does."""
    images, _ = _source_digits()
    buffer = io.BytesIO()
    Image.fromarray(images[int(item.key.removeprefix("digit-"))]).save(buffer, format="PNG")
    return buffer.getvalue()
