"""Students: diffusion transformers with taps for the alignment."""

from pipeline.models.factory import make_student
from pipeline.models.sit import DiT, SiT
from pipeline.models.taps import StudentOutput, Taps

__all__ = ["DiT", "SiT", "StudentOutput", "Taps", "make_student"]
