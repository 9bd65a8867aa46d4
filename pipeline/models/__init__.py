"""Students: diffusion transformers with taps for the alignment."""

from pipeline.models.sit import SiT
from pipeline.models.taps import StudentOutput, Taps

__all__ = ["SiT", "StudentOutput", "Taps"]
