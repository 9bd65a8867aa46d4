"""Where two manifests differ."""

from __future__ import annotations

from collections.abc import Iterator


def differences(was: object, now: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Dotted path, value here and value there of all that differs in two dumped models."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from differences(was.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif was != now:
        yield path, was, now
