"""HASTE as a pipeline: run the teacher once, store its outputs, train on them without it.

``from pipeline import open_store`` opens a store in plain Python, for loops of one's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schemas.installation import report_missing_packages

if TYPE_CHECKING:
    from pipeline.library import open_store

__all__ = ["open_store"]

report_missing_packages()


def __getattr__(name: str) -> Any:
    """``open_store`` on its first use, because it needs torch, which takes seconds to import."""
    if name != "open_store":
        raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
    from pipeline.library import open_store

    return open_store
