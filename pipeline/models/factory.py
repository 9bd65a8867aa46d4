"""Construction of a student from its config."""

from __future__ import annotations

from typing import Any

from pipeline.models.sit import DiT, SiT
from schemas.student import StudentConfig

STUDENTS = {"SiT": SiT, "DiT": DiT}


def make_student(config: StudentConfig, **variant: Any) -> SiT:
    """A newly initialised network of type ``config.model``; ``variant``: keywords of ``SiT``."""
    return STUDENTS[config.family](config, **variant)
