"""How the numbers of a tensor are stored; the bytes of the stored arrays are another matter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from pipeline.store.codecs.base import MAIN, Array, Codec
from pipeline.store.codecs.floats import BFloat16, Plain
from pipeline.store.codecs.int8 import Int8
from pipeline.store.codecs.probabilities import CubeRoot, SquareRoot
from pipeline.store.codecs.quantised import HeadSteps, PerTokenQuantiser
from schemas.codecs import CodecName
from schemas.store import Column

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MAIN",
    "Array",
    "Codec",
    "Decoder",
    "column_arrays",
    "decode_column",
    "decoder_of",
    "encode_column",
    "find_codec",
    "part_name",
    "sums_to_one",
]

FIXED: dict[CodecName, Codec] = {
    "float32": Plain("<f4"),
    "float16": Plain("<f2"),
    "bfloat16": BFloat16(),
    "int64": Plain("<i8"),
    "uint8": Plain("|u1"),
    "int8": Int8(),
    "int8_group64": Int8(group=64),
    "int8_outliers16": Int8(outliers=16),
    "int8_centred": Int8(centred=True),
    "cbrt8": CubeRoot(),
}


@lru_cache
def find_codec(name: CodecName) -> Codec:
    """The codec of a name. Raises ``ValueError`` where there is none."""
    if name in FIXED:
        return FIXED[name]
    match = re.fullmatch(r"(tokens|rms|heads|sqrt)(\d+)", name)
    if match is None:
        raise ValueError(f"there is no codec '{name}'")
    fineness = int(match[2])
    if match[1] == "heads":
        return HeadSteps(fineness)
    if match[1] == "sqrt":
        return SquareRoot(fineness)
    return PerTokenQuantiser(fineness, relative=match[1] == "tokens")


def sums_to_one(name: CodecName) -> bool:
    """Whether rows of probabilities are decoded to rows that sum to 1, within rounding: those whose
    numbers were rounded one by one are not."""
    return isinstance(find_codec(name), CubeRoot | SquareRoot) or name == "float32"


def part_name(column: str, array: str) -> str:
    """The name under which one of a column's arrays is stored."""
    return f"{column}.{array}" if array != MAIN else column


def encode_column(name: str, column: Column, values: Tensor) -> dict[str, Tensor]:
    """A batch of a column's tensors (B, *shape) to its stored arrays (B, ...), by part name.

    Raises ``ValueError`` where the tensors are of another shape than the column's.
    """
    if tuple(values.shape[1:]) != column.shape:
        raise ValueError(f"{name}: expected shape {column.shape}, got {tuple(values.shape[1:])}")
    arrays = find_codec(column.codec).encode(values)
    return {part_name(name, array): tensor for array, tensor in arrays.items()}


class Decoder(NamedTuple):
    """Makes a batch of one column's tensors (B, *shape) of its stored arrays (B, ...)."""

    codec: Codec
    names: Mapping[str, str]
    """The codec's arrays -> the parts' names."""

    def __call__(self, parts: Mapping[str, Tensor]) -> Tensor:
        return self.codec.decode({array: parts[name] for array, name in self.names.items()})


def decoder_of(name: str, column: Column) -> Decoder:
    """A column's decoder."""
    codec = find_codec(column.codec)
    return Decoder(codec, {array: part_name(name, array) for array in codec.arrays(column.shape)})


def decode_column(name: str, column: Column, parts: Mapping[str, Tensor]) -> Tensor:
    """The inverse of ``encode_column``, on the device where ``parts`` lie."""
    return decoder_of(name, column)(parts)


def column_arrays(name: str, column: Column) -> list[str]:
    """Names of a column's stored arrays."""
    return list(decoder_of(name, column).names.values())
