"""Options of ``python -m pipeline.report``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Strict

Attention = Literal["auto", "remote", "none"]


class ReportConfig(Strict):
    """The runs to compare, and the page to write."""

    runs: Annotated[tuple[str, ...], Field(max_length=32)] = ()
    """Folders or URLs of runs, which contain metrics.jsonl, in the order of the page."""
    html: str | None = None
    """The HTML file to write; it needs no other files and no network."""
    attention: Attention = "auto"
    """'auto': for a local run without attention images, draw the attention of its checkpoints next
    to the teacher's, if its store is a folder of this machine and its student has at most two
    billion weights. 'remote': also open a store at a URL that the run's config names. 'none': show
    only the images of the runs."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of the page's path."""
