"""Codecs for token vectors: 8-bit integers with scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pipeline.store.codecs.base import MAIN, Array, Shape
from schemas.codecs import Lossless

if TYPE_CHECKING:
    from torch import Tensor

MAX_CODE = 127
TINY = 1e-30  # the scale of a vector of zeros


@dataclass(frozen=True)
class Int8:
    """x = centre + scale * code, with a scale for each token or each ``group`` of its channels.

    ``centred``: each channel's median over the sample's tokens is subtracted first, because DINOv2
    has channels that are large in every token and would make all scales coarse.
    ``outliers``: number of channels, those with the largest numbers of a sample, that are stored in
    float16 and do not count for the scales.
    """

    group: int | None = None
    centred: bool = False
    outliers: int = 0
    family = "int8"
    levels = 0
    lossless: ClassVar[Lossless] = "zstd"

    @property
    def bits_per_value(self) -> float | None:
        if self.group or self.outliers:
            return None
        return 7.4 if self.centred else 7.9

    def arrays(self, shape: Shape) -> dict[str, Array]:
        if len(shape) < 1 or not shape[-1]:
            raise ValueError(f"int8 codecs are for vectors, not for shape {shape}")
        if len(shape) < 2 and (self.centred or self.outliers):
            raise ValueError(f"this int8 codec is for several tokens, not for shape {shape}")
        *outer, width = shape
        if self.group is not None and width % self.group:
            raise ValueError(f"{width} channels are not a multiple of the codec's {self.group}")
        if self.outliers >= width:
            raise ValueError(f"{width} channels are too few to keep {self.outliers} apart")
        groups = (width // self.group,) if self.group else ()
        arrays = {
            MAIN: Array(np.dtype("|i1"), shape),
            "scale": Array(np.dtype("<f4"), (*outer, *groups)),
        }
        if self.centred:
            arrays["centre"] = Array(np.dtype("<f4"), (*outer[:-1], width))
        if self.outliers:
            arrays["channels"] = Array(np.dtype("<i2"), (*outer[:-1], self.outliers))
            arrays["outliers"] = Array(np.dtype("<f2"), (*outer, self.outliers))
        return arrays

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        x = values.float()
        arrays: dict[str, Tensor] = {}
        if self.centred:
            centre = x.median(dim=-2).values
            arrays["centre"] = centre
            x = x - centre.unsqueeze(-2)
        if self.outliers:
            channels = x.abs().amax(-2).topk(self.outliers, dim=-1).indices.sort().values
            index = channels.unsqueeze(-2).expand(*x.shape[:-1], -1)
            arrays["channels"] = channels.short()
            arrays["outliers"] = x.gather(-1, index).half()
            x = x.scatter(-1, index, 0.0)
        grouped = x.unflatten(-1, (-1, self.group)) if self.group else x
        scale = grouped.abs().amax(-1).clamp_min(TINY) / MAX_CODE
        arrays["scale"] = scale
        arrays[MAIN] = (grouped / scale.unsqueeze(-1)).round().char().view(values.shape)
        return arrays

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        codes, scale = arrays[MAIN].float(), arrays["scale"].unsqueeze(-1)
        if self.group:
            x = (codes.unflatten(-1, (-1, self.group)) * scale).flatten(-2)
        else:
            x = codes * scale
        if self.outliers:
            index = arrays["channels"].long().unsqueeze(-2).expand(*x.shape[:-1], -1)
            x = x.scatter(-1, index, arrays["outliers"].float())
        if self.centred:
            x = x + arrays["centre"].unsqueeze(-2)
        return x
