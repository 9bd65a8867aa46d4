"""Stored bytes per image for each cut and codec.

Counted on the arrays that an extraction would write, with an estimate of lossless compression.
"""

from __future__ import annotations

import math

from pipeline.cost_estimate.meta_models import Geometry
from pipeline.store.arrays import StoredArray, stream_parts
from pipeline.store.codecs import find_codec
from pipeline.targets.cuts import codec_set_of, cut_columns
from schemas.codecs import CodecSet
from schemas.extract import Cut
from schemas.fields import element_count
from schemas.store import Column, TeacherStream

COMPARED_CODECS: tuple[CodecSet, ...] = ("faithful", "small", "float16")
"""Codec sets shown in every estimate."""
CROP_CODEC = "uint8"  # the only codec of the cut 'image'

TAR_BLOCK = 512
NPY_HEADER = 128


def stored_bytes(cut: Cut, codec: CodecSet, geometry: Geometry, *, compress: bool = True) -> int:
    """Bytes per image of the teacher stream, without the latents (``latent_bytes``)."""
    return _stream_bytes(cut_columns(cut, geometry, geometry.resolution, codec, compress=compress))


def codec_set(stream: TeacherStream) -> str:
    """The codec set that made a stream; the codec of its largest tensor where it is none."""
    largest = max(stream.columns.values(), key=lambda column: element_count(column.shape))
    return codec_set_of(stream.columns) or largest.codec


def latent_bytes(geometry: Geometry) -> int:
    """Bytes per image of mean and std in float16, and of the label."""
    latent = Column(shape=geometry.latent_shape, codec="float16")
    label = Column(shape=(), codec="int64")
    return _stream_bytes({"mean": latent, "std": latent, "label": label})


def _stream_bytes(columns: dict[str, Column]) -> int:
    total = 0
    for name, part in stream_parts(columns).items():
        column = columns[name.partition(".")[0]]
        bits = find_codec(column.codec).bits_per_value if part.lossless != "none" else None
        size = part.nbytes if bits is None else math.prod(column.shape) * bits / 8
        total += _member(part, size)
    return total


def _member(part: StoredArray, size: float) -> int:
    """A tar member: header, .npy header, data, padding."""
    data = 3 if part.is_class else NPY_HEADER + round(size)
    return TAR_BLOCK * (1 - -data // TAR_BLOCK)
