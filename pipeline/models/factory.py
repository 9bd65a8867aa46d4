"""From a config to a student."""

from __future__ import annotations

from pipeline.models.dit import DiT
from pipeline.models.sit import SiT
from schemas.student import StudentConfig

STUDENTS = {"SiT": SiT, "DiT": DiT}


def make_student(config: StudentConfig) -> SiT:
    """The network that ``config.model`` names, freshly initialised."""
    return STUDENTS[config.family](config)
