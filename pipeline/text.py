"""Numbers and long texts made short for people."""

from __future__ import annotations


def describe_bytes(count: float) -> str:
    """Three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


MAX_TEXT = 300
"""Characters of one text: whoever wrote a run's files does not decide how long the page gets."""


def shortened(text: str, length: int = MAX_TEXT) -> str:
    """Both ends of a long text, as names tell themselves apart by either."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}\N{HORIZONTAL ELLIPSIS}{text[-end:]}"


def short_number(value: float) -> str:
    """120000 as 120k; small numbers with as many digits as they need."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def short_value(value: object, length: int = 80) -> str:
    """A value of a manifest or of options in an error: at most ``length`` characters of it."""
    if value is None or value == ():
        return "none"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
