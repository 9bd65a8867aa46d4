"""Names of codecs, of sets of codecs and of lossless compression."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

_CODEC = (
    r"^(float32|float16|bfloat16|int64|uint8|int8(_group64|_outliers16|_centred)?|cbrt8"
    r"|(tokens|rms|heads|rice)[1-9][0-9]{0,2}|sqrt[1-9][0-9]{0,3})$"
)


def _codec_name(name: str) -> str:
    if re.fullmatch(_CODEC[1:-1], name) is None:
        raise PydanticCustomError(
            "codec_name",
            "'{name}' is not a codec: there are float32, float16, bfloat16, int64, uint8, int8, "
            "int8_group64, int8_outliers16, int8_centred and cbrt8; rice, tokens, rms and heads "
            "followed by 1 to 999 levels per RMS (rice28); sqrt followed by 1 to 9999 levels "
            "(sqrt510)",
            {"name": name[:60]},
        )
    return name


CodecName = Annotated[
    str, AfterValidator(_codec_name), WithJsonSchema({"type": "string", "pattern": _CODEC})
]
"""Name of a codec of ``pipeline.store.codecs``. A number after rice, tokens, rms or heads is its
levels per RMS, after sqrt its levels per unit."""

Lossless = Literal["none", "zstd", "blosc"]
"""'zstd' entropy-codes integers; 'blosc' shuffles bits first, for floats."""

CodecSet = Literal["faithful", "small", "int8", "bfloat16", "float16", "float32"]
"""A codec for each tensor of a cut, listed in ``pipeline.targets.cuts.CODEC_SETS``."""
