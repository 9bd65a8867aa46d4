"""Field types that several models share."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


def parse_layers(value: Any) -> Any:
    """``"7-11"``, ``"2,3,4"``, an int or a sequence, as a tuple of 0-based layer numbers."""
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, str):
        return value
    layers: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(f"'{value}' is not a list of layers such as 7-11 or 7,9,11")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first > 1000:
            raise ValueError(f"'{part.strip()}' is not a range of layers, lowest first")
        layers.extend(range(first, last + 1))
    return tuple(layers)


Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(parse_layers)]
"""0-based block numbers."""

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
"""Of a stream or a column: also a folder's, so without anything that could lead elsewhere."""

Shape = Annotated[tuple[Annotated[int, Field(ge=0, le=1 << 24)], ...], Field(max_length=8)]
"""Sizes of one sample's array; bounded, so that a hostile manifest cannot ask for the moon."""

LOADING_ARGUMENTS = frozenset(
    {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
)


def _refuse_loading(arguments: dict[str, Any]) -> dict[str, Any]:
    for name in sorted(LOADING_ARGUMENTS & arguments.keys()):
        raise ValueError(f"{name} is not taken: teacher.weights says which weights are loaded")
    return arguments


ModelArguments = Annotated[dict[str, Any], AfterValidator(_refuse_loading)]
"""Of timm.create_model, but for those that load files: a manifest's come from whoever made the
store, and what they name is not his to choose."""

MAX_COLUMN_ELEMENTS = 1 << 30


def element_count(shape: tuple[int, ...]) -> int:
    """Number of elements of ``shape``; raises ``ValueError`` beyond ``MAX_COLUMN_ELEMENTS``."""
    count = math.prod(shape)
    if math.prod(max(size, 1) for size in shape) > MAX_COLUMN_ELEMENTS:  # numpy minds, too
        raise ValueError(f"shape {shape} has {count} elements; the limit is {MAX_COLUMN_ELEMENTS}")
    return count
