"""The options of ``jobs/export.py``."""

from __future__ import annotations

from schemas.base import Strict


class ExportConfig(Strict):
    """Which checkpoint is exported, and where to."""

    checkpoint: str | None = None
    """A run's folder or URL (its newest checkpoint is taken), or one checkpoint's."""
    out: str | None = None
    """The .pt file to write."""
