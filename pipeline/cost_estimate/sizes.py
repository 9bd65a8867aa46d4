"""Stored bytes per image for each cut and codec.

Counted on the arrays that an extraction would write, with an estimate of lossless compression.
"""

from __future__ import annotations

import math
import re
from typing import get_args

from pipeline.cost_estimate.meta_models import Geometry
from pipeline.store.arrays import StoredArray, stream_parts
from pipeline.targets.cuts import cut_columns
from schemas.codecs import CodecName, CodecSet
from schemas.extract import Cut
from schemas.fields import element_count
from schemas.store import Column, TeacherStream

COMPARED_CODECS: tuple[CodecSet, ...] = ("faithful", "small", "float16")
"""Codec sets shown in every estimate."""
CROP_CODEC = "uint8"  # the only codec of the cut 'image'

NORMAL = 0.5 * math.log2(2 * math.pi * math.e)  # bits of a normal number, in units of its std
TAR_BLOCK = 512
NPY_HEADER = 128


def stored_bytes(cut: Cut, codec: CodecSet, geometry: Geometry, *, compress: bool = True) -> int:
    """Bytes per image of the teacher stream, without the latents (``latent_bytes``)."""
    return _stream_bytes(cut_columns(cut, geometry, geometry.resolution, codec, compress=compress))


def codec_set(stream: TeacherStream, resolution: int) -> str:
    """The codec set that made a stream; the codec of its largest tensor where it is none."""
    if stream.cut == "image":
        return CROP_CODEC
    made = {name: column.codec for name, column in stream.columns.items()}
    for codec in get_args(CodecSet):
        columns = cut_columns(stream.cut, stream.teacher, resolution, codec)
        if made == {name: column.codec for name, column in columns.items()}:
            return str(codec)
    return max(stream.columns.values(), key=lambda column: element_count(column.shape)).codec


def latent_bytes(geometry: Geometry) -> int:
    """Bytes per image of mean and std in float16, and of the label."""
    latent = Column(shape=geometry.latent_shape, codec="float16")
    label = Column(shape=(), codec="int64")
    return _stream_bytes({"mean": latent, "std": latent, "label": label})


def coded_bits(codec: CodecName) -> float | None:
    """Bits of one number after entropy coding; None where bytes stay as they are.

    Of what random weights of trained models' statistics make of photographs. Streams come out
    within 10% of that, in bfloat16 within 15%: its exponents say more in attention than in tokens.
    """
    match = re.fullmatch(r"(tokens|rms|heads|sqrt)(\d+)", codec)
    if match is None:
        return {"int8_centred": 7.4, "int8": 7.9, "cbrt8": 7.45, "bfloat16": 13.7}.get(codec)
    fineness = math.log2(int(match[2]))
    # Codes of "tokens" and "heads" have a standard deviation of about their fineness, those of
    # "rms" less, as the centre is taken off; square roots of probabilities are mostly small.
    return {
        "tokens": 1.04 * (fineness + NORMAL),
        "rms": 0.9 * (fineness + NORMAL),
        "heads": fineness + NORMAL,
        "sqrt": fineness - 3.4,
    }[match[1]]


def _stream_bytes(columns: dict[str, Column]) -> int:
    total = 0
    for name, part in stream_parts(columns).items():
        column = columns[name.partition(".")[0]]
        bits = coded_bits(column.codec) if part.lossless != "none" else None
        size = part.nbytes if bits is None else math.prod(column.shape) * bits / 8
        total += _member(part, size)
    return total


def _member(part: StoredArray, size: float) -> int:
    """A tar member: header, .npy header, data, padding."""
    data = 3 if part.is_class else NPY_HEADER + round(size)
    return TAR_BLOCK * (1 - -data // TAR_BLOCK)
