"""Construction of a student from its config."""

from __future__ import annotations

from pipeline.models.sit import DiT, SiT
from schemas.student import StudentConfig

STUDENTS = {"SiT": SiT, "DiT": DiT}


def make_student(config: StudentConfig) -> SiT:
    """A newly initialised network of type ``config.model``."""
    return STUDENTS[config.family](config)
