"""What the harness can be asked."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import Strict


class FaultOptions(Strict):
    """Options of ``python -m tests.faults``."""

    store: str | None = None
    """Folder of the harness: the undisturbed store and run, the results, what is being broken."""
    count: Annotated[int, Field(ge=1)] = 12
    """Faults that the results shall hold in the end; those of earlier calls with this seed and
    --store count."""
    seed: int = 0
    """Decides which faults come, when, and what they hit."""
    faults: tuple[str, ...] = ()
    """Only these (--faults kill-worker,fill-disk); default: all that can be made here."""
    keep: bool = False
    """Leave the folders of runs that did not survive, to look at."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of the table."""
