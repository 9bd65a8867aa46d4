"""Codec variants of each cut that the frontier measures."""

from __future__ import annotations

from typing import NamedTuple, get_args

from schemas.codecs import CodecName, CodecSet
from schemas.extract import Cut


class CodecVariant(NamedTuple):
    """A codec set, with overrides for single tensors."""

    codec: CodecSet
    overrides: dict[str, CodecName]
    compress: bool = True

    @property
    def name(self) -> str:
        tensors: dict[CodecName, list[str]] = {}
        for tensor, codec in self.overrides.items():
            tensors.setdefault(codec, []).append(tensor)
        parts = [f"{' and '.join(names)} {codec}" for codec, names in tensors.items()]
        if not parts:
            parts = [self.codec]
        return ", ".join(parts) + ("" if self.compress else ", not compressed")


TOKENS: tuple[CodecName, ...] = (
    "tokens64",
    "tokens56",
    "tokens48",
    "tokens28",
    "tokens24",
    "tokens22",
    "tokens18",
    "tokens16",
    "tokens12",
    "tokens10",
    "tokens9",
    "tokens7",
    "tokens6",
    "tokens5",
    "rms26",
    "int8",
    "int8_group64",
    "int8_outliers16",
)
FACTORS: tuple[CodecName, ...] = (
    "heads32",
    "heads28",
    "heads18",
    "heads12",
    "heads11",
    "heads8",
    "int8_group64",
)
ATTENTION: tuple[CodecName, ...] = ("sqrt510", "sqrt360", "sqrt255", "sqrt180", "float16")
FEATURES: tuple[CodecName, ...] = ("rms32", "rms20", "rms16", "rms12", "int8", "tokens20")


def codec_variants(cut: Cut, *, singles: bool) -> list[CodecVariant]:
    """Every codec set, and with ``singles`` also 'faithful' with single codecs replaced."""
    if cut == "image":
        return [CodecVariant("faithful", {})]
    variants = [CodecVariant(codec, {}) for codec in get_args(CodecSet)]
    if not singles:
        return variants
    if cut == "activations":
        variants += [CodecVariant("faithful", {"tokens": codec}) for codec in TOKENS]
        variants.append(CodecVariant("int8", {}, compress=False))
    elif cut == "qk":
        variants += [CodecVariant("faithful", {"query": codec, "key": codec}) for codec in FACTORS]
    else:
        variants += [CodecVariant("faithful", {"attention": codec}) for codec in ATTENTION]
        variants += [CodecVariant("faithful", {"features": codec}) for codec in FEATURES]
    return variants
