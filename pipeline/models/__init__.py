"""Students: diffusion transformers with taps for the alignment."""

from pipeline.models.factory import Student, make_student
from pipeline.models.mmdit import MMDiT
from pipeline.models.sit import DiT, SiT
from pipeline.models.taps import StudentOutput, Taps

__all__ = ["DiT", "MMDiT", "SiT", "Student", "StudentOutput", "Taps", "make_student"]
