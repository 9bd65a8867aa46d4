"""`python -m pipeline.convert`: re-encode a store without running the extraction again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.convert.job import Conversion, convert

__all__ = ["Conversion", "convert"]


def __getattr__(name: str) -> object:
    """Imports the job at its first use, because torch takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from pipeline.convert import job

    return getattr(job, name)
