"""Frozen vision transformers whose features and attention are the targets of the alignment."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.teachers.teacher import Teacher, TeacherTargets

__all__ = ["Teacher", "TeacherTargets"]


def __getattr__(name: str) -> object:
    """Imports the teacher at its first use, because runs on a store without the cut
    ``activations`` or ``image`` need neither it nor timm, which takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from pipeline.teachers import teacher

    return getattr(teacher, name)
