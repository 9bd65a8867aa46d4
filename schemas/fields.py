"""Field types that several models share."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

Count = Annotated[int, Field(ge=0, le=1 << 40)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Place = Annotated[str, Field(max_length=4096)]
"""A path, a URL or an id on the hub."""

_NUMBER = r"(\d+(?:_\d+)*)"
"""A decimal number, as on a command line: zeros before it mean nothing."""


def is_none(value: object) -> bool:
    """True for None: an ``exclude_if`` that leaves a key out of saved JSON."""
    return value is None


def parse_layers(value: Any) -> Any:
    """``"7-11"``, ``"2,3,4"``, an int or a sequence, as a tuple of 0-based layer numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, str):
        return value
    layers: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(rf"\s*{_NUMBER}\s*(?:-\s*{_NUMBER}\s*)?", part, re.ASCII)
        if match is None:
            raise ValueError(f"'{value}' is not a list of layers such as 7-11 or 7,9,11")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first > 1000 or len(layers) > 1000:
            raise ValueError(f"'{part.strip()}' is not a range of layers, lowest first")
        layers.extend(range(first, last + 1))
    return tuple(layers)


Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(parse_layers)]
"""0-based block numbers."""


def _rise(layers: tuple[int, ...]) -> tuple[int, ...]:
    if not layers or list(layers) != sorted(set(layers)):
        raise ValueError("name each layer once, lowest first")
    return layers


RisingLayers = Annotated[Layers, AfterValidator(_rise)]
"""Teacher layers of a store: at least one, each once, lowest first."""


def _rise_if_any(layers: tuple[int, ...]) -> tuple[int, ...]:
    return _rise(layers) if layers else layers


StoredLayers = Annotated[Layers, AfterValidator(_rise_if_any)]
"""Teacher layers of a stream: each once, lowest first; empty for a stream without attention."""


def format_layers(numbers: Sequence[int]) -> str:
    """The inverse of ``parse_layers``, with ranges: ``"0-2,7"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


class Repeated:
    """Mark of an option for several texts that is given once for each, because they may contain
    commas."""


MAX_NAME = 64
"""Characters of a name."""
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
"""Name of a stream or a column; also a folder name, so it contains no dots or slashes."""

COMMITS = "commits"
"""Folder of a store that holds its commit records, next to the folders of its streams."""


def _is_free(name: str) -> str:
    if name == COMMITS:
        raise ValueError(f"'{name}' is the folder of the commit records: choose another name")
    return name


StreamName = Annotated[Name, AfterValidator(_is_free)]
"""Name of a stream, which is also its folder below the store's root."""

TEXT = "text"
"""Name of the stream of captions that is extracted with the latents."""


def is_text_stream(name: str) -> bool:
    """True for names of added streams that hold captions: text, text_t5."""
    return name == TEXT or name.startswith(f"{TEXT}_")


CLASS = "class"
"""Name of the class stream that is extracted with the latents."""


def class_stream_name(teacher_stream: str, *, added: bool) -> str:
    """Name of the class stream of a teacher stream, which may be an added one."""
    return f"{teacher_stream}_{CLASS}" if added else CLASS


ModelId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$", max_length=128)]
"""A model that timm defines. 'hf-hub:' and 'local-dir:' names are excluded: they load files."""

Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
"""Seed of a torch generator."""

Shape = Annotated[tuple[Annotated[int, Field(ge=0, le=1 << 24)], ...], Field(max_length=8)]
"""Sizes of one sample's array. The bounds limit the memory that an untrusted manifest requests."""

MAX_CLASSES = 1 << 24
"""Classes of a data set; labels are smaller."""

LOADING_ARGUMENTS = frozenset(
    {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
)


MAX_ARGUMENT = 1 << 14
"""Largest number, and most characters of a text, among a model's arguments."""
MAX_ARGUMENTS = 64


def _check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    for name in sorted(LOADING_ARGUMENTS & arguments.keys()):
        raise ValueError(f"{name} is refused: teacher.weights says which weights are loaded")
    values: list[Any] = [arguments]
    for count, value in enumerate(values):  # grows as it is walked through
        if count > MAX_ARGUMENTS:
            raise ValueError(f"there are more than {MAX_ARGUMENTS} arguments")
        if isinstance(value, dict):
            values.extend([*value.keys(), *value.values()])
        elif isinstance(value, list | tuple):
            values.extend(value)
        elif isinstance(value, str):
            if len(value) > MAX_ARGUMENT:
                raise ValueError(
                    f"text is {len(value)} characters; at most {MAX_ARGUMENT} are allowed"
                )
        elif isinstance(value, int | float) and not abs(value) <= MAX_ARGUMENT:  # NaN, too
            raise ValueError(f"{_short(value)} is out of range; at most {MAX_ARGUMENT} is allowed")
    return arguments


def _short(number: float) -> str:
    """The number, unless it has more digits than Python prints."""
    whole = isinstance(number, int) and number.bit_length() > 64
    return "an enormous number" if whole else str(number)


ModelArguments = Annotated[dict[str, Any], AfterValidator(_check_arguments)]
"""Arguments of timm.create_model, except those that load files, because the manifest of a store is
untrusted. Their number and values are bounded."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DIGEST = 16
"""Hexadecimal digits of a SHA-256 that identify a file or an array in records."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""The first digits of a SHA-256."""
MAX_TEXT = 200


def text_or_digest(text: str) -> str:
    """A short text unchanged, a long one as the beginning of its SHA-256."""
    if len(text) <= MAX_TEXT:
        return text
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:DIGEST]}"


MAX_COLUMN_ELEMENTS = 1 << 30


def element_count(shape: tuple[int, ...]) -> int:
    """Number of elements of ``shape``; raises ``ValueError`` beyond ``MAX_COLUMN_ELEMENTS``."""
    count = math.prod(shape)
    if math.prod(max(size, 1) for size in shape) > MAX_COLUMN_ELEMENTS:  # numpy has the same limit
        raise ValueError(f"shape {shape} has {count} elements; the limit is {MAX_COLUMN_ELEMENTS}")
    return count
