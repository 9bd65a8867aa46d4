"""Codecs: numbers of a tensor to stored arrays and back; ``store.arrays`` makes bytes of those."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

from pipeline.store.codecs.base import MAIN, STORED_AS_IS, Array, Codec
from pipeline.store.codecs.floats import BFloat16, Plain
from pipeline.store.codecs.int8 import Int8
from pipeline.store.codecs.probabilities import CubeRoot, SquareRoot
from pipeline.store.codecs.quantised import PerHeadQuantiser, PerTokenQuantiser
from pipeline.store.codecs.rice import RicePerToken
from schemas.codecs import CodecName
from schemas.streams import Column

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MAIN",
    "Array",
    "Codec",
    "Decoder",
    "coarser_than",
    "codec_family",
    "column_arrays",
    "decode_column",
    "decoder_of",
    "encode_column",
    "find_codec",
    "part_name",
    "plain_layout",
    "relayout",
    "same_numbers",
    "sums_to_one",
]

WITHOUT_LEVELS: dict[CodecName, Codec] = {
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


WITH_LEVELS: dict[str, Callable[[int], Codec]] = {
    "tokens": partial(PerTokenQuantiser, relative=True),
    "rice": partial(RicePerToken, relative=True),
    "rms": partial(PerTokenQuantiser, relative=False),
    "heads": PerHeadQuantiser,
    "sqrt": SquareRoot,
}
"""Codecs whose name ends in their number of levels, such as ``tokens23``."""
INT8_LEVELS = range(16, 49)
"""Levels of 'tokens', 'rice', 'rms' and 'heads' that int8 codecs may be equivalent to. Their step
is a 127th of a vector's largest number, which is 3 (Gaussian) to 8 (channels of large values) times
its RMS; whether int8 or the 'faithful' set (20 to 26 levels) is finer depends on the teacher."""


def codec_family(name: CodecName) -> str | None:
    """The name without its levels, such as 'tokens' of 'tokens23'; None for codecs without."""
    return name.rstrip("0123456789") if name not in WITHOUT_LEVELS else None


@lru_cache
def find_codec(name: CodecName) -> Codec:
    """The codec of a name. Raises ``ValueError`` for an unknown one."""
    if name in WITHOUT_LEVELS:
        return WITHOUT_LEVELS[name]
    prefix = name.rstrip("0123456789")
    if prefix == name or prefix not in WITH_LEVELS:
        raise ValueError(f"there is no codec '{name}'")
    return WITH_LEVELS[prefix](int(name.removeprefix(prefix)))


def coarser_than(stored: CodecName, other: CodecName) -> bool:
    """True if ``stored`` has certainly dropped digits that ``other`` would keep.

    Floats may become any other floats: float32 holds all shorter ones exactly (and makes bfloat16,
    which numpy lacks, readable by any software); the two 16-bit ones are of equal size.
    """
    old, new = find_codec(stored), find_codec(other)
    if old.family == STORED_AS_IS:
        return False
    if new.family == STORED_AS_IS:
        return True
    if old.family == new.family:
        return new.levels > old.levels
    if old.family == "int8":
        return new.family != "sqrt" and new.levels > INT8_LEVELS[-1]
    return new.family == "int8" and old.family != "sqrt" and old.levels < INT8_LEVELS[0]


def plain_layout(name: CodecName) -> CodecName:
    """The codec of the same numbers, bit for bit, without packing: tokens23 of rice23."""
    return f"tokens{find_codec(name).levels}" if codec_family(name) == "rice" else name


def same_numbers(one: CodecName, other: CodecName) -> bool:
    """True if both codecs decode to the same numbers, bit for bit, and differ in layout only."""
    return plain_layout(one) == plain_layout(other)


def relayout(
    name: str, before: Column, after: Column, parts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The stored arrays of a column in another layout of ``same_numbers``, without loss."""
    old, new = find_codec(before.codec), find_codec(after.codec)
    assert isinstance(old, PerTokenQuantiser)
    assert isinstance(new, PerTokenQuantiser)
    arrays = {array: parts[part_name(name, array)] for array in old.arrays(before.shape)}
    moved = {**arrays, MAIN: new.with_codes(old.codes(arrays))}
    return {part_name(name, array): tensor for array, tensor in moved.items()}


def sums_to_one(name: CodecName) -> bool:
    """True if decoded rows of probabilities sum to 1 within rounding. Rows whose numbers were
    rounded one by one do not."""
    return isinstance(find_codec(name), CubeRoot | SquareRoot) or name == "float32"


def part_name(column: str, array: str) -> str:
    """The name under which one of a column's arrays is stored."""
    return f"{column}.{array}" if array != MAIN else column


def encode_column(name: str, column: Column, values: Tensor) -> dict[str, Tensor]:
    """The stored arrays (B, ...) of a batch of a column's tensors (B, *shape), by part name.

    Raises ``ValueError`` when the tensors do not have the column's shape.
    """
    if tuple(values.shape[1:]) != column.shape:
        raise ValueError(f"{name}: expected shape {column.shape}, got {tuple(values.shape[1:])}")
    arrays = _encode_layers(column, values) if column.levels else _encode(column.codec, values)
    return {part_name(name, array): tensor for array, tensor in arrays.items()}


def _encode(codec: CodecName, values: Tensor) -> dict[str, Tensor]:
    return find_codec(codec).encode(values)


def _encode_layers(column: Column, values: Tensor) -> dict[str, Tensor]:
    """Stored arrays (B, L, ...) of layers (B, L, ...) with levels of their own."""
    import torch

    family = codec_family(column.codec)
    layers = [
        _encode(f"{family}{levels}", values[:, row : row + 1])
        for row, levels in enumerate(column.levels)
    ]
    return {array: torch.cat([one[array] for one in layers], 1) for array in layers[0]}


class Decoder(NamedTuple):
    """Decodes a batch of stored arrays (B, ...) to one column's tensors (B, *shape)."""

    codec: Codec
    names: Mapping[str, str]
    """Array name of the codec -> part name."""

    def __call__(self, parts: Mapping[str, Tensor]) -> Tensor:
        return self.codec.decode({array: parts[name] for array, name in self.names.items()})


def decoder_of(name: str, column: Column) -> Decoder:
    """The decoder of a column."""
    codec = find_codec(column.codec)
    return Decoder(codec, {array: part_name(name, array) for array in codec.arrays(column.shape)})


def decode_column(name: str, column: Column, parts: Mapping[str, Tensor]) -> Tensor:
    """The inverse of ``encode_column``, on the device of ``parts``."""
    return decoder_of(name, column)(parts)


def column_arrays(name: str, column: Column) -> list[str]:
    """Names of a column's stored arrays."""
    return list(decoder_of(name, column).names.values())
