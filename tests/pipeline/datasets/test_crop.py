"""Encoded bytes to crops: the reference's values, all modes, and bytes that are not an image."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.datasets.crop import BadImageError, decode_crop


def encoded(image: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("number", range(6))
def test_crop_is_the_reference_s_to_the_bit(shared: Path, number: int) -> None:
    data = (shared / "golden" / f"crop_{number:02d}.jpg").read_bytes()
    with Image.open(shared / "golden" / f"crop_{number:02d}.png") as expected:
        assert expected.mode == "RGB"
        assert np.array_equal(decode_crop(data, expected.width), np.asarray(expected))


def test_an_image_of_the_right_size_is_kept_to_the_bit() -> None:
    pixels = noise(32, 32)
    crop = decode_crop(encoded(Image.fromarray(pixels)), 32)
    assert np.array_equal(crop, pixels)
    assert (crop.dtype, crop.flags.c_contiguous) == (np.uint8, True)


def test_a_crop_is_kept_to_the_bit_and_of_another_size_refused() -> None:
    pixels = noise(32, 32)
    data = encoded(Image.fromarray(pixels))
    assert np.array_equal(decode_crop(data, 32, cropped=True), pixels)
    for size in ((32, 33), (33, 32), (64, 64)):
        data = encoded(Image.fromarray(noise(*size)))
        with pytest.raises(BadImageError, match=f"^{size[1]}x{size[0]} pixels; its latent is of"):
            decode_crop(data, 32, cropped=True)


def test_the_centre_is_what_is_kept() -> None:
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = noise(32, 32)
    assert np.array_equal(decode_crop(encoded(Image.fromarray(wide)), 32), wide[:, 16:48])
    tall = wide.transpose(1, 0, 2)
    assert np.array_equal(decode_crop(encoded(Image.fromarray(tall)), 32), tall[16:48])


@pytest.mark.parametrize("size", [(68, 300), (300, 68), (68, 68), (1, 1), (1000, 17), (513, 512)])
def test_any_size_becomes_the_resolution(size: tuple[int, int]) -> None:
    assert decode_crop(encoded(Image.new("RGB", size, (9, 8, 7))), 64).shape == (64, 64, 3)
    assert (decode_crop(encoded(Image.new("RGB", size, (9, 8, 7))), 64) == (9, 8, 7)).all()


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("L", "JPEG")],
)
def test_any_mode_becomes_rgb(mode: str, file_format: str) -> None:
    image = Image.fromarray(noise(32, 32)).convert(mode)
    data = encoded(image, file_format)
    stored = Image.open(io.BytesIO(data))
    assert stored.mode == mode
    assert np.array_equal(decode_crop(data, 32), np.asarray(stored.convert("RGB")))


def test_transparent_palette_keeps_its_colours() -> None:
    image = Image.fromarray(noise(32, 32)).quantize(16)
    image.info["transparency"] = 3
    crop = decode_crop(encoded(image), 32)
    assert np.array_equal(crop, np.asarray(image.convert("RGB")))


def test_cmyk_becomes_rgb() -> None:
    data = encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG")
    assert np.abs(decode_crop(data, 32).astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_greys_are_scaled_not_clipped(file_format: str) -> None:
    grey = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    data = encoded(Image.fromarray(grey), file_format)
    assert Image.open(io.BytesIO(data)).mode.startswith("I;16")
    assert np.array_equal(decode_crop(data, 32), np.repeat((grey >> 8)[..., None], 3, -1))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_truncated_image_is_bad(file_format: str) -> None:
    whole = encoded(Image.fromarray(noise(64, 64)), file_format)
    for share in (0.3, 0.7, 0.95):
        with pytest.raises(BadImageError):
            decode_crop(whole[: int(len(whole) * share)], 32)


@pytest.mark.parametrize("data", [b"", b"no image\n", b"\xff\xd8\xff", bytes(4096)])
def test_bytes_that_are_not_an_image_are_bad(data: bytes) -> None:
    with pytest.raises(BadImageError, match="not an image"):
        decode_crop(data, 32)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [99, 60])  # Pillow warns at its limit, raises at twice that
def test_decompression_bomb_is_bad(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    data = encoded(Image.new("RGB", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_crop(data, 10).shape == (10, 10, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadImageError, match="limit"):
        decode_crop(data, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(BadImageError):
        decode_crop(data, 10)


def test_a_thin_strip_that_would_be_resized_beyond_the_limit_is_bad() -> None:
    """1 x 200,000 pixels are few, but 256 x 51,200,000 would exhaust memory."""
    with pytest.raises(BadImageError, match="limit"):
        decode_crop(encoded(Image.new("L", (200_000, 1))), 256)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP", "GIF", "TIFF", "DDS"])
def test_damaged_bytes_give_an_image_or_a_bad_image(file_format: str) -> None:
    whole = encoded(Image.fromarray(noise(24, 20)), file_format)
    rng = random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(4):
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        complaint = "none"
        try:
            assert decode_crop(bytes(data), 16).shape == (16, 16, 3)
        except BadImageError as error:
            complaint = str(error)
        assert complaint
        assert "\n" not in complaint
