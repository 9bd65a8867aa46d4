"""Options of ``jobs/export.py``."""

from __future__ import annotations

from schemas.base import Strict


class ExportConfig(Strict):
    """The checkpoint to export, and its destination."""

    checkpoint: str | None = None
    """Folder or URL of a run (its newest checkpoint is exported) or of one checkpoint."""
    out: str | None = None
    """The .pt file to write."""
