"""The options of ``python -m pipeline.report``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Strict

Attention = Literal["auto", "remote", "none"]


class ReportConfig(Strict):
    """Which runs to compare, and where the page goes."""

    runs: Annotated[tuple[str, ...], Field(max_length=32)] = ()
    """Folders or URLs of the runs, those with metrics.jsonl in them; in the order of the page."""
    html: str | None = None
    """The page to write: one file that needs no other, and no network."""
    attention: Attention = "auto"
    """'auto': of a local run that has drawn no attention itself, draw that of its kept checkpoints
    beside the teacher's, where its store is a folder of this machine and its student has at most
    two billion weights. 'remote': also where its config names a store at a URL, which is then
    opened. 'none': show only what the runs drew."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of the page's path."""
