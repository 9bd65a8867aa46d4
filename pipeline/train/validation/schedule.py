"""The steps after which a run validates."""

from __future__ import annotations

from collections.abc import Callable

Pause = Callable[[], None]
"""Called between two batches, equally often on every rank; serves requests to save or stop and may
raise ``StoppedError``."""


def is_due(step: int, every: int | None, last: int) -> bool:
    """True after every ``every`` steps and after the last; ``every`` None: never."""
    return every is not None and (step % every == 0 or step == last)
