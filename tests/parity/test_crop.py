"""Issue 3, parity 5: centre crops, bit-exact."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.datasets.crop import decode_crop
from tests.parity.reference import Golden


def test_crop_is_the_reference_s_to_the_bit(golden: Golden, crop: dict[str, Any]) -> None:
    # exact because Pillow decodes both; another JPEG decoder may be a few grey levels off
    source = golden.image(crop["file"])
    pixels = decode_crop(source.read_bytes(), golden.configs["crop"]["resolution"])
    picture = golden.image(str(Path(crop["file"]).with_suffix(".png")))
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(picture).convert("RGB")))
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == crop["sha256_of_output_pixels"]
    grey = np.all(pixels == pixels[..., :1])
    assert bool(grey) == crop["all_channels_equal"]
