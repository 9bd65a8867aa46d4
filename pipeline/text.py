"""Short forms of numbers and long texts for display."""

from __future__ import annotations

import re
from typing import Any


def describe_bytes(count: float) -> str:
    """A number of bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


MAX_TEXT = 300
"""Characters of a displayed text, because files of a run may contain longer ones."""


def shortened(text: str, length: int = MAX_TEXT) -> str:
    """Both ends of a long text, because names may differ at either end."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}\N{HORIZONTAL ELLIPSIS}{text[-end:]}"


def short_number(value: float) -> str:
    """A number with up to four digits and a unit: 120000 as 120k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def rounded(value: Any, digits: int = 4) -> Any:
    """JSON values whose floats have ``digits`` digits, for display."""
    if isinstance(value, dict):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner, digits) for inner in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def describe_hours(hours: float, digits: int = 3) -> str:
    """A duration with up to ``digits`` digits: 0.02 as 72 s."""
    for size, unit in ((1, "h"), (1 / 60, "min")):
        if hours >= size:
            return f"{short_number(float(f'{hours / size:.{digits}g}'))} {unit}"
    return f"{3600 * hours:.{digits}g} s"


def counted(count: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 image, 2,000 images."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def short_value(value: object, length: int = 80) -> str:
    """A value of a manifest or an option for error messages, at most ``length`` characters."""
    if value is None or value == ():
        return "none"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def unpickling_fault(error: Exception) -> str:
    """Reason why ``torch.load(weights_only=True)`` refuses a file; its own message advises to run
    the code in the file."""
    found = re.search(r"GLOBAL (\S+) (?:was not|whose)", str(error))
    held = f"it holds a {found[1]}" if found else "damaged, or more than tensors"
    return f"{held}: no code is run"
