"""How the student is aligned, and when that ends."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.base import Strict
from schemas.fields import Layers


class FixedStep(Strict):
    """Terminate before a given step."""

    kind: Literal["fixed"] = "fixed"
    """The trigger."""
    step: Annotated[int, Field(ge=0)]
    """The first step without alignment."""


TerminationConfig = FixedStep


class AlignmentConfig(Strict):
    """The alignment losses (HASTE sections 2.1 and 2.3). Both weights 0 is a vanilla run."""

    feature_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the feature loss; 0 switches it off."""
    attention_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the attention loss; 0 switches it off."""
    feature_depth: Annotated[int, Field(ge=1)] = 8
    """The student block whose output tokens are aligned, 1-based."""
    student_layers: Layers = (4, 5, 6, 7)
    """Student blocks whose attention is aligned, 0-based."""
    teacher_layers: Layers = (8, 9, 10, 11)
    """The teacher layer that each of them follows, 0-based."""
    projector_width: Annotated[int, Field(ge=1)] = 2048
    """Hidden width of the projector."""
    termination: TerminationConfig | None = None
    """When the alignment ends; none keeps it to the end."""

    @property
    def active(self) -> bool:
        """Whether a teacher is needed at all."""
        return bool(self.feature_weight or self.attention_weight)

    @model_validator(mode="after")
    def _layers_pair_up(self) -> AlignmentConfig:
        if len(self.student_layers) != len(self.teacher_layers):
            raise ValueError(
                f"{len(self.student_layers)} student_layers and {len(self.teacher_layers)} "
                "teacher_layers do not pair up"
            )
        if self.attention_weight and not self.student_layers:
            raise ValueError("the attention loss needs student_layers and teacher_layers")
        if list(self.student_layers) != sorted(set(self.student_layers)):
            raise ValueError("name each of student_layers once, lowest first")
        return self
