"""Options of the alignment and of its termination."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from schemas.base import Strict
from schemas.fields import Layers, Name


class FixedStep(Strict):
    """Terminate before a given step (the paper's trigger, section 2.4)."""

    kind: Literal["fixed"] = "fixed"
    """The trigger: 'fixed', 'gradient_cosine' or 'residual_plateau'."""
    dry: bool = False
    """Only log when the trigger would have terminated."""
    step: Annotated[int, Field(ge=0)]
    """fixed: the first step without alignment."""


class GradientCosine(Strict):
    """Terminate when the alignment's gradient opposes the denoising gradient (appendix A.2)."""

    kind: Literal["gradient_cosine"]
    """The trigger: 'fixed', 'gradient_cosine' or 'residual_plateau'."""
    dry: bool = False
    """Only log when the trigger would have terminated."""
    start: Annotated[int, Field(ge=0)] = 50_000
    """First step at which the trigger is evaluated."""
    every: Annotated[int, Field(ge=1)] = 10_000
    """Steps between two evaluations of the trigger."""
    samples: Annotated[int, Field(ge=1)] = 2048
    """gradient_cosine: samples of one evaluation."""
    times: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.02, 0.1, 0.5, 0.8)
    """gradient_cosine: diffusion times; the mean of their cosines is compared."""
    threshold: Annotated[float, Field(ge=-1, le=1)] = -0.05
    """gradient_cosine: terminate when the mean cosine is below this."""


class ResidualPlateau(Strict):
    """Terminate when the fast and slow moving averages of the alignment residual, updated at every
    step, agree: it has stopped falling."""

    kind: Literal["residual_plateau"]
    """The trigger: 'fixed', 'gradient_cosine' or 'residual_plateau'."""
    dry: bool = False
    """Only log when the trigger would have terminated."""
    start: Annotated[int, Field(ge=0)] = 50_000
    """First step at which the trigger is evaluated."""
    every: Annotated[int, Field(ge=1)] = 100
    """Steps between two evaluations of the trigger."""
    fast: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """residual_plateau: decay of the fast average."""
    slow: Annotated[float, Field(gt=0, lt=1)] = 0.99995
    """residual_plateau: decay of the slow average."""
    tolerance: Annotated[float, Field(gt=0)] = 0.02
    """residual_plateau: relative difference at which the averages agree."""


TerminationConfig = FixedStep | GradientCosine | ResidualPlateau


DEFAULT_KIND: Final = "fixed"
"""Kind of a termination that does not name one."""


def _with_kind(value: Any) -> Any:
    """The default kind, because a discriminated union ignores the default of its key."""
    return {"kind": DEFAULT_KIND, **value} if isinstance(value, dict) else value


class AlignmentConfig(Strict):
    """The alignment losses (HASTE sections 2.1 and 2.3). Both weights 0: a vanilla run."""

    feature_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the feature loss; 0 switches it off."""
    attention_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the attention loss; 0 switches it off."""
    feature_depth: Annotated[int, Field(ge=1)] = 8
    """The student block whose output tokens are aligned, 1-based."""
    student_layers: Layers = (4, 5, 6, 7)
    """Student blocks whose attention is aligned, 0-based."""
    teacher_layers: Layers = (8, 9, 10, 11)
    """The teacher layer that each student layer is aligned to, 0-based."""
    projector_width: Annotated[int, Field(ge=1)] = 2048
    """Hidden width of the projector MLP."""
    stream: Name | None = None
    """Teacher stream to align to, where the store holds several."""
    termination: (
        Annotated[TerminationConfig, Field(discriminator="kind"), BeforeValidator(_with_kind)]
        | None
    ) = None
    """Trigger that ends the alignment; none: the whole run is aligned."""

    @property
    def active(self) -> bool:
        """True if the run needs a teacher."""
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
        if self.termination is not None and not self.active:
            raise ValueError("a run without alignment has nothing to terminate: termination none")
        if list(self.student_layers) != sorted(set(self.student_layers)):
            raise ValueError("name each of student_layers once, lowest first")
        return self
