"""A layout of quantised tokens that the host only copies and the device unpacks.

Entropy coding by zstd costs the loader ten times the copy. Here the integers of
``PerTokenQuantiser`` are written by Rice's code (JPL publication 79-22; JPEG-LS uses it too), which
is as short for normal numbers and can be decoded for all values at once: each token has its own
number of low bits, stored at a fixed rate, and the rest of its numbers in unary, in a bit string of
its own.

The bytes of a sample of T tokens of W numbers: T headers (uint16, little-endian), then the tokens,
each beginning with a new byte. The upper 4 bits of a header are b - 1, b being the bits of a value
at the fixed rate, the lower 12 bits the bytes of the token's unary string. A code c is the sign
s = (c < 0) and the magnitude m = c, or -c - 1. A token is first W values of b bits, the sign below
the lowest b - 1 bits of m, then the unary string: m >> (b - 1) zeros and a one for each value. With
b = 16, for whatever no smaller b makes shorter, there is no unary string. Bits are numbered from
the lowest of each byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pipeline.store.codecs.base import MAIN, Array, Shape
from pipeline.store.codecs.quantised import PerTokenQuantiser
from schemas.codecs import Lossless

if TYPE_CHECKING:
    from torch import Tensor

RAW_BITS = 16
"""Sign and magnitude of any code."""
HEADER_BYTES = 2
UNARY_BITS = 12
"""Bits of a header for the bytes of a unary string."""
MAX_WIDTH = 1 << 13
SPARE_BYTES = 2
"""After the largest sample, because a value is taken from three bytes wherever it begins."""


class RicePerToken(PerTokenQuantiser):
    """``PerTokenQuantiser`` with the same numbers, step and centre, in another layout."""

    lossless: ClassVar[Lossless] = "none"

    def arrays(self, shape: Shape) -> dict[str, Array]:
        others = super().arrays(shape)
        del others[MAIN]
        tokens, width = shape
        if width > MAX_WIDTH:
            raise ValueError(f"it is for at most {MAX_WIDTH} channels, not for shape {shape}")
        largest = tokens * (HEADER_BYTES + row_bytes(width, RAW_BITS)) + SPARE_BYTES
        # The last one, because the reader's fast path allows one array of varying length, the last.
        return {**others, MAIN: Array(np.dtype("|u1"), (largest,), trimmed=True)}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        codes, others = self.quantise(values)
        return {**others, MAIN: pack(codes)}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self.dequantise(unpack(arrays[MAIN], *self._shape(arrays)), arrays)

    def codes(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return unpack(arrays[MAIN], *self._shape(arrays))

    def with_codes(self, codes: Tensor) -> Tensor:
        return pack(codes)

    @staticmethod
    def _shape(arrays: Mapping[str, Tensor]) -> tuple[int, int]:
        return arrays["step"].shape[-1], arrays["centre"].shape[-1]


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a token's values at a fixed rate."""
    return (width * bits + 7) // 8


def unary_bytes_limit(width: int) -> int:
    """Largest number of bytes of a token's unary string: with more than 2 zeros a value, one more
    bit at the fixed rate would halve them and so be shorter, but for rounding to bytes."""
    return (3 * width + 31) // 8


def pack(codes: Tensor) -> Tensor:
    """Integers (B, T, W) within 16 bits to bytes (B, ...), unused ones 0."""
    import torch

    batch, tokens, width = codes.shape
    codes = codes.nan_to_num(0.0, 0.0, 0.0).long()  # of samples that are refused: see `not_finite`
    sign = (codes < 0).long()
    magnitude = codes ^ -sign
    raw = row_bytes(width, RAW_BITS)
    size = torch.full((batch, tokens), raw, device=codes.device)
    bits, unary = torch.full_like(size, RAW_BITS), torch.zeros_like(size)
    for rate in range(1, RAW_BITS):
        string = (width + (magnitude >> (rate - 1)).sum(-1) + 7) // 8
        total = row_bytes(width, rate) + string
        better = (total < size) & (string <= unary_bytes_limit(width))
        size, bits = total.where(better, size), bits.where(~better, rate)
        unary = string.where(better, unary)

    begin = HEADER_BYTES * tokens + size.cumsum(-1) - size
    out = codes.new_zeros(batch, tokens * (HEADER_BYTES + raw) + SPARE_BYTES, dtype=torch.int32)
    header = (bits - 1 << UNARY_BITS) + unary
    out[:, 0 : HEADER_BYTES * tokens : 2] = header.int() & 255
    out[:, 1 : HEADER_BYTES * tokens : 2] = header.int() >> 8

    def add(byte: Tensor, value: Tensor) -> None:  # bits never overlap, so that sums are unions
        out.scatter_add_(1, byte.flatten(1), value.int().flatten(1))

    number = torch.arange(width, device=codes.device)
    bits, begin = bits.unsqueeze(-1), begin.unsqueeze(-1)
    position = number * bits
    value = (magnitude & (1 << bits - 1) - 1) * 2 + sign << (position & 7)
    for byte in range(3):
        add(begin + (position >> 3) + byte, value >> 8 * byte & 255)
    zeros = (magnitude >> bits - 1).cumsum(-1)
    has_unary = bits < RAW_BITS
    ones = (number + zeros).where(has_unary, 0)
    add(begin + (width * bits + 7) // 8 + (ones >> 3), (1 << (ones & 7)) * has_unary)
    return out.byte()


def unpack(packed: Tensor, tokens: int, width: int) -> Tensor:
    """Integers (B, T, W), int32, of bytes (B, ...). Whatever the bytes are, none outside the
    sample is read: those of damaged samples give undefined numbers."""
    import torch

    device, last = packed.device, packed.shape[1] - 1 - SPARE_BYTES

    def read(byte: Tensor) -> Tensor:
        return packed.gather(1, byte.flatten(1)).view(byte.shape).int()

    head = packed[:, : HEADER_BYTES * tokens].unflatten(1, (tokens, HEADER_BYTES)).long()
    header = head[..., :1] + (head[..., 1:] << 8)
    bits, unary = (header >> UNARY_BITS) + 1, header & (1 << UNARY_BITS) - 1
    fixed = (width * bits + 7) >> 3
    begin = HEADER_BYTES * tokens + (fixed + unary).cumsum(1) - fixed - unary

    position = torch.arange(width, device=device) * bits
    byte = (begin + (position >> 3)).clamp(max=last)
    window = read(byte) + (read(byte + 1) << 8) + (read(byte + 2) << 16)
    value = window >> (position & 7).int() & ((1 << bits) - 1).int()

    # The place of each value's one in its token's unary string, by a search in the number of ones
    # up to each bit.
    place = torch.arange(unary_bytes_limit(width), device=device)
    string = read((begin + fixed + place).clamp(max=last)) * (place < unary)
    every_bit = string.unsqueeze(-1) >> torch.arange(8, device=device, dtype=torch.int32) & 1
    ones = every_bit.flatten(2).cumsum(-1, dtype=torch.int32)
    rank = torch.arange(1, width + 1, device=device, dtype=torch.int32)
    rank = rank.expand(*ones.shape[:2], -1).contiguous()
    found = torch.searchsorted(ones, rank, out_int32=True)
    zeros = found - torch.nn.functional.pad(found[..., :-1], (1, 0), value=-1) - 1
    upper = zeros.where(bits < RAW_BITS, 0) << (bits - 1).int()
    magnitude = (value >> 1) + upper
    return magnitude ^ -(value & 1)


def impossible_headers(
    packed: np.ndarray, places: np.ndarray, tokens: int, width: int
) -> np.ndarray:
    """(n,) bool: True for those of the samples (B, ...) at n places whose tokens cannot have the
    lengths that their headers give, which a checksum does not show where they were written so."""
    header = packed[places, : HEADER_BYTES * tokens].view("<u2").astype(np.int64)
    bits, unary = (header >> UNARY_BITS) + 1, header & (1 << UNARY_BITS) - 1
    least = np.where(bits < RAW_BITS, (width + 7) // 8, 0)
    most = np.where(bits < RAW_BITS, unary_bytes_limit(width), 0)
    end = HEADER_BYTES * tokens + ((width * bits + 7) // 8 + unary).sum(1)
    lengths = (unary < least) | (unary > most)
    result: np.ndarray = lengths.any(1) | (end > packed.shape[1] - SPARE_BYTES)
    return result
