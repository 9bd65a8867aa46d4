"""Names of the ways in which a tensor's numbers can be stored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

CodecName = Annotated[
    str,
    Field(
        pattern=r"^(float32|float16|bfloat16|int64|uint8|int8(_group64|_outliers16|_centred)?|cbrt8"
        r"|(tokens|rms|heads)[1-9][0-9]{0,2}|sqrt[1-9][0-9]{0,3})$"
    ),
]
"""See ``pipeline.store.codecs`` for what each one keeps. A number behind a name is its fineness."""

Lossless = Literal["none", "zstd", "blosc"]
"""'zstd' entropy-codes integers; 'blosc' shuffles bits before that, for floats."""

CodecSet = Literal["faithful", "small", "int8", "bfloat16", "float16", "float32"]
"""A codec for each tensor of a cut; ``pipeline.alignment.cuts`` says which."""
