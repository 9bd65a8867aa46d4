"""Encoded bytes to crops: the reference's values, all modes, and bytes that are not an image."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path
from zlib import compress, crc32

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


RAMP = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
LITTLE = RAMP.astype("<u2").tobytes()
UPPER = (RAMP >> 8).astype(np.uint8)


def tiff(data: bytes, bits: int, *, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A TIFF of 32 x 32 samples in one strip, written by the specification."""
    tags = {256: 32, 257: 32, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 32}
    tags |= {279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    entries = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + entries


def packed_12_bits(values: np.ndarray) -> bytes:
    bits = (values.reshape(-1, 1) >> np.arange(12)[::-1]) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def pgm(maxval: int, plain: bool = False) -> bytes:
    """The ramp scaled to ``maxval``."""
    values = np.rint(RAMP.astype(np.float64) * maxval / 65535).astype(
        ">u2" if maxval > 255 else "u1"
    )
    data = " ".join(map(str, values.ravel())).encode() if plain else values.tobytes()
    return f"P{2 if plain else 5}\n32 32\n{maxval}\n".encode() + data


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (pgm(65535), 0),
        (pgm(4095), 1),
        (pgm(4095, plain=True), 1),
        (pgm(1023), 1),
        (pgm(15), 9),
        (tiff(LITTLE, 16), 0),
        (tiff((65535 - RAMP).astype("<u2").tobytes(), 16, photometric=0), 0),
        (tiff(packed_12_bits(RAMP >> 4), 12), 0),
    ],
    ids=["pgm16", "pgm12", "plain12", "pgm10", "pgm4", "tiff16", "tiff16 inverted", "tiff12"],
)
def test_greys_of_every_depth_are_scaled(data: bytes, tolerance: int) -> None:
    crop = decode_crop(data, 32).astype(int)
    assert np.abs(crop - UPPER[..., None]).max() <= tolerance


def dds_of_half_floats() -> bytes:
    """A DDS of 4 x 4 pixels in BC6H."""
    header = struct.pack("<7I44x", 124, 0x1007, 4, 4, 16, 0, 0)
    pixel_format = struct.pack("<2I4s5I", 32, 4, b"DX10", 0, 0, 0, 0, 0)
    caps = struct.pack("<5I", 0x1000, 0, 0, 0, 0)
    return b"DDS " + header + pixel_format + caps + struct.pack("<5I", 95, 3, 0, 1, 0) + bytes(16)


def eight_bit_palette() -> bytes:
    """A TIFF whose palette has numbers of 8 bits, not 16."""
    data = encoded(Image.fromarray(UPPER).quantize(16), "TIFF")
    palette = Image.open(io.BytesIO(data)).tag_v2[320]
    wide, narrow = (struct.pack("<768H", *(c // n for c in palette)) for n in (1, 256))
    assert wide in data
    return data.replace(wide, narrow)


def fits16() -> bytes:
    """Signed numbers with an offset, which Pillow does not read."""
    cards = ["SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 32", "NAXIS2  = 32", "END"]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + LITTLE.ljust(
        2880, b"\0"
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "32-bit or signed integer"),
        (tiff(RAMP.astype("<u4").tobytes(), 32, sample_format=1), "32-bit or signed integer"),
        (tiff(LITTLE, 16, sample_format=2), "32-bit or signed integer"),
        (tiff(UPPER.tobytes(), 8, sample_format=2), "signed integer"),
        (encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "PPM"), "floating-point"),
        (dds_of_half_floats(), "floating-point"),
        (fits16(), "a 16-bit FITS"),
        (eight_bit_palette(), "palette of 8-bit numbers"),
    ],
    ids=["int32", "uint32", "int16", "int8", "float", "pfm", "bc6h", "fits", "palette"],
)
def test_values_without_a_known_range_are_bad(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=f"{reason}.*; convert it to 8 or 16 bits"):
        decode_crop(data, 32)


def test_colours_of_16_bits_are_scaled() -> None:
    """Pillow itself reduces them to their upper 8 bits; by hand, because it writes none."""
    wide = np.random.default_rng(0).integers(0, 65536, (32, 32, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">2I5B", 32, 32, 16, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(decode_crop(png, 32), wide >> 8)
    ppm = b"P6\n32 32\n65535\n" + wide.tobytes()
    assert np.array_equal(decode_crop(ppm, 32), np.rint(wide / 257))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBX", "CMYK", "YCbCr", "LAB"])
def test_modes_of_tiffs_become_rgb(mode: str) -> None:
    """Colours without conversion to the bit, others to a few levels; opaque, so that premultiplied
    values are the values themselves."""
    image = Image.fromarray(noise(32, 32))
    grey = Image.fromarray(UPPER)
    expected, tolerance = np.asarray(image), 0
    if mode in {"LA", "La"}:
        image, expected = grey.convert("LA"), np.asarray(grey.convert("RGB"))
    elif mode == "PA":
        image = image.quantize(64)
        expected = np.asarray(image.convert("RGB"))
        image = image.convert("PA")
    elif mode != "RGBX":
        muted = Image.fromarray(64 + UPPER // 2)
        image, tolerance = Image.merge("RGB", (muted, muted.rotate(90), muted.rotate(180))), 10
        expected = np.asarray(image)
    data = encoded(image if mode == "La" else image.convert(mode), "TIFF")
    if mode == "La":  # ExtraSamples: unassociated to associated
        data = data.replace(struct.pack("<HHII", 338, 3, 1, 2), struct.pack("<HHII", 338, 3, 1, 1))
        assert Image.open(io.BytesIO(data)).mode == "La"
    assert np.abs(decode_crop(data, 32).astype(int) - expected).max() <= tolerance


def test_alpha_is_dropped_not_blended() -> None:
    pixels = np.concatenate([noise(32, 32), np.zeros((32, 32, 1), np.uint8)], 2)
    assert np.array_equal(decode_crop(encoded(Image.fromarray(pixels)), 32), pixels[..., :3])


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
