"""Construction of a student from its config."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.models.mmdit import MMDiT
from pipeline.models.sit import DiT, SiT
from schemas.student import StudentConfig

Student = SiT | MMDiT

STUDENTS: dict[str, type[Student]] = {"SiT": SiT, "DiT": DiT, "MMDiT": MMDiT}


def make_student(config: StudentConfig, **variant: Any) -> Student:
    """A newly initialised network of type ``config.model``; ``variant``: its keywords."""
    return STUDENTS[config.family](config, **variant)


def blank_condition(config: StudentConfig, samples: int) -> Tensor:
    """The third input of a student for B samples, of the shape that it has in training: classes,
    int64 (B,), or text embeddings, float32 (B, T, E); all 0."""
    if config.family == "MMDiT":
        return torch.zeros(samples, *config.text_shape)
    return torch.zeros(samples, dtype=torch.long)
