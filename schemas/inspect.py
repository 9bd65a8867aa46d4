"""The options of ``python -m pipeline.inspect``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import Strict


class InspectConfig(Strict):
    """What to tell about a store."""

    store: str | None = None
    """Folder or URL of the store."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of a page."""
    sample: str | None = None
    """Key of a sample to draw, with --png."""
    png: str | None = None
    """The picture file to write."""
