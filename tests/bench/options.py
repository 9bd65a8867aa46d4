"""Options of all benchmarks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import Strict


class BenchOptions(Strict):
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of tables."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Arithmetic threads of torch; one gives the times of a single core."""
