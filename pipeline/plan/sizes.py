"""Stored bytes of an image, per cut and codec.

Nominal sizes times measured ratios (notes: synthetic attention and random weights, so 10-20% off on
real ones). Everything else here takes bytes from this file only.
"""

from __future__ import annotations

from pipeline.plan.geometry import Geometry

CODECS: dict[str, tuple[str, ...]] = {
    "maps": ("uint8", "float16"),
    "qk": ("int8", "float16"),
    "activations": ("int8", "float16"),
    "image": ("uint8",),
}
"""The cuts, and how each can be stored."""

ZSTD_MAPS = 0.72  # cube-root of row-max probabilities: 0.564 of 0.786 MB per layer
ZSTD_QK = 0.95  # int8 per token and head: 0.385 of 0.406 MB per layer
ZSTD_TOKENS = 0.92  # int8 per token with outlier channels apart: 0.188 of 0.205 MB
LOSSLESS_CROP = 0.66  # about 0.13 of 0.197 MB of a 256 px crop
SCALE = 2  # bytes of one float16 scale
TAR_BLOCK = 512
NPY_HEADER = 128


def stored_bytes(cut: str, codec: str, geometry: Geometry) -> int:
    """Bytes of the teacher's stream for one image; latents are apart (``latent_bytes``)."""
    if codec not in CODECS[cut]:
        raise ValueError(f"cut {cut} has no codec {codec}")
    g = geometry
    small = codec in ("uint8", "int8")
    if cut == "image":
        return _member(3 * g.resolution**2 * LOSSLESS_CROP)
    if cut == "activations":
        medians = SCALE * g.width if small else 0
        return _member(_tokens(g.tokens, g.width, small) + medians)
    features = _member(_tokens(g.patches, g.width, small)) + _member(2 * g.width)
    per_layer = g.heads * g.patches
    layers = len(g.layers)
    if cut == "maps":
        numbers = layers * per_layer * g.patches
        return features + _member(numbers * ZSTD_MAPS if small else 2 * numbers)
    # queries and keys are a member each; an int8 vector of a token and head brings its scale
    vector = (g.head_width + SCALE) * ZSTD_QK if small else 2 * g.head_width
    return features + 2 * _member(layers * per_layer * vector)


def latent_bytes(geometry: Geometry) -> int:
    """Bytes of mean and std in float16, and the label."""
    channels, rows, columns = geometry.latent_shape
    return 2 * _member(2 * channels * rows * columns) + 2 * TAR_BLOCK


def _tokens(count: int, width: int, small: bool) -> float:
    return count * (width + SCALE) * ZSTD_TOKENS if small else 2 * count * width


def _member(data: float) -> int:
    """A tar member: header, .npy header, data, padding."""
    blocks = -(-(NPY_HEADER + round(data)) // TAR_BLOCK)
    return TAR_BLOCK * (1 + blocks)
