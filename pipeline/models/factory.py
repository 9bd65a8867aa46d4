"""Construction of a student from its config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.models.mmdit import MMDiT
from pipeline.models.sit import DiT, SiT
from schemas.student import StudentConfig

Student = SiT | MMDiT

STUDENTS: dict[str, type[Student]] = {"SiT": SiT, "DiT": DiT, "MMDiT": MMDiT}


def make_student(config: StudentConfig, **variant: Any) -> Student:
    """A newly initialised network of type ``config.model``; ``variant``: its keywords."""
    return STUDENTS[config.family](config, **variant)


RANDOM = (
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.kaiming_uniform_,
    Tensor.uniform_,
    Tensor.normal_,
)
"""Functions that draw weights; others of ``torch.nn.init`` call the last two."""


class Uninitialised(TorchFunctionMode):
    """Context in which weights are not drawn but left as they are allocated, for networks whose
    weights are then loaded, because drawing takes longer than loading."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in RANDOM:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def blank_condition(config: StudentConfig, samples: int) -> Tensor:
    """The third input of a student for B samples, of the shape that it has in training: classes,
    int64 (B,), or text embeddings, float32 (B, T, E); all 0."""
    if config.family == "MMDiT":
        return torch.zeros(samples, *config.text_shape)
    return torch.zeros(samples, dtype=torch.long)
