"""Options of the harness."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import Strict


class FaultOptions(Strict):
    """Options of ``python -m tests.faults``."""

    store: str | None = None
    """Folder of the harness: the undisturbed store and run, the results, the disturbed runs."""
    count: Annotated[int, Field(ge=1)] = 12
    """Total number of faults in the results, including those of earlier calls with this seed and
    --store."""
    seed: int = 0
    """Determines the faults, their times and their targets."""
    faults: tuple[str, ...] = ()
    """Only these (--faults kill-worker,fill-disk); default: all that are available here."""
    keep: bool = False
    """Keep the folders of runs that did not survive, for inspection."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of the table."""
