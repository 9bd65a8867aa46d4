"""Options of the alignment and of its termination."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from schemas.base import Strict
from schemas.fields import Layers, Name, RisingLayers, is_none


class Ramp(Strict):
    """Gradual change of the weights of all alignment losses."""

    kind: Literal["linear", "cosine"] = "linear"
    """Course of the factor: a straight line, or half a period of a cosine."""
    steps: Annotated[int, Field(ge=1)]
    """Length in steps."""


OptionalRamp = Annotated[Ramp | None, Field(exclude_if=is_none)]


class FixedStep(Strict):
    """Terminate before a given step (the paper's trigger, section 2.4)."""

    kind: Literal["fixed"] = "fixed"
    """The trigger: 'fixed', 'gradient_cosine' or 'residual_plateau'."""
    dry: bool = False
    """Only log when the trigger would have terminated."""
    step: Annotated[int, Field(ge=0)]
    """fixed: the first step without alignment."""
    ramp: OptionalRamp = None
    """Fade the weights: with 'fixed' over the steps before its step, else from the step at which
    the trigger fires on. The alignment ends when they reach 0."""

    @model_validator(mode="after")
    def _ramp_fits(self) -> FixedStep:
        if self.ramp is not None and self.ramp.steps > self.step:
            raise ValueError(
                f"ramp.steps {self.ramp.steps} is longer than the alignment, which ends at step "
                f"{self.step}"
            )
        return self


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
    ramp: OptionalRamp = None
    """Fade the weights: with 'fixed' over the steps before its step, else from the step at which
    the trigger fires on. The alignment ends when they reach 0."""


class ResidualPlateau(Strict):
    """Terminate when the fast and slow moving averages of a residual, over steps, agree: it has
    stopped falling."""

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
    residual: Literal["alignment", "validation_loss"] = Field(
        default="alignment", exclude_if=lambda value: value == "alignment"
    )
    """residual_plateau: 'alignment', the distance of the alignment losses from a perfect fit, or
    'validation_loss', that of the weights as trained (validation.every), which counts for all steps
    since the measurement before; it may also rise. Three measurements are needed at least."""
    ramp: OptionalRamp = None
    """Fade the weights: with 'fixed' over the steps before its step, else from the step at which
    the trigger fires on. The alignment ends when they reach 0."""


TerminationConfig = FixedStep | GradientCosine | ResidualPlateau


DEFAULT_KIND: Final = "fixed"
"""Kind of a termination that does not name one."""


def _with_kind(value: Any) -> Any:
    """The default kind, because a discriminated union ignores the default of its key."""
    return {"kind": DEFAULT_KIND, **value} if isinstance(value, dict) else value


ProjectorKind = Literal["mlp", "conv"]
TargetKind = Literal["final", "unnormed", "sum_of_layers"]
Normalisation = Literal["none", "spatial"]


def _is(default: Any) -> Callable[[Any], bool]:
    """If a value is this default: left out of saved files, because names on disk are frozen."""
    return lambda value: value == default


class StreamAlignment(Strict):
    """The alignment losses of one teacher stream (HASTE sections 2.1 and 2.3)."""

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
    projector: ProjectorKind = Field(default="mlp", exclude_if=_is("mlp"))
    """'mlp': three linear layers (REPA, HASTE); 'conv': one convolution over the grid of tokens
    (iREPA)."""
    projector_kernel: Literal[1, 3] | None = Field(default=None, exclude_if=_is(None))
    """conv: tokens per side of the kernel; 3 in iREPA's paper, 1 in its released SiT config."""
    target: TargetKind = Field(default="final", exclude_if=_is("final"))
    """Teacher tokens that features are aligned to: 'final', after its final norm; 'unnormed',
    before it; 'sum_of_layers', the sum over target_layers, each after the final norm. The last two
    need a stream of cut 'activations' or 'image'."""
    target_layers: RisingLayers | None = Field(default=None, exclude_if=_is(None))
    """sum_of_layers: teacher layers, 0-based, for example 19-23."""
    normalisation: Normalisation = Field(default="none", exclude_if=_is("none"))
    """'spatial': the target's channels are normalised over the tokens of each image (iREPA)."""
    normalisation_strength: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, exclude_if=_is(None)
    )
    """spatial: share of the mean that is subtracted, 0.6 to 0.8 in iREPA."""

    @property
    def active(self) -> bool:
        """True if one of the losses is on."""
        return bool(self.feature_weight or self.attention_weight)

    @model_validator(mode="after")
    def _layers_pair_up(self) -> Self:
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

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        """Each kind has its option and no other has it, so that no default is hidden."""
        for key, kind, option in (
            ("projector", "conv", "projector_kernel"),
            ("target", "sum_of_layers", "target_layers"),
            ("normalisation", "spatial", "normalisation_strength"),
        ):
            chosen, value = getattr(self, key), getattr(self, option)
            if chosen == kind and value is None:
                raise ValueError(f"{key} {kind} needs {option}")
            if chosen != kind and value is not None:
                raise ValueError(f"{option} is for {key} {kind}, not for {chosen}: set it to none")
        return self


def _list_of_mappings(value: Any) -> Any:
    entries = value if isinstance(value, list | tuple) else [value]
    if entries is not value or not all(isinstance(e, dict | StreamAlignment) for e in entries):
        raise ValueError(
            "expected a list of mappings such as [{stream: NAME, feature_weight: 0.25}], or []"
        )
    return value


def place(number: int) -> str:
    """Key of the options of the stream with this number in ``AlignmentConfig.streams``."""
    return f"alignment.others.{number - 1}" if number else "alignment"


class AlignmentConfig(StreamAlignment):
    """The alignment of a run. Options outside of ``others`` are those of the first teacher stream;
    both of its weights 0: a vanilla run.

    The alignment loss is the sum of all streams' losses, each times its weight. REPA averages over
    its encoders: its coefficient 0.5 for two encoders is a feature_weight of 0.25 for each.
    """

    others: Annotated[tuple[StreamAlignment, ...], BeforeValidator(_list_of_mappings)] = Field(
        default=(), exclude_if=_is(())
    )
    """Further teacher streams, each with a projector of its own: a list of mappings with the
    options of the first, from feature_weight to normalisation_strength. [] for none."""
    termination: (
        Annotated[TerminationConfig, Field(discriminator="kind"), BeforeValidator(_with_kind)]
        | None
    ) = None
    """Trigger that ends the alignment; none: the whole run is aligned."""
    warmup: OptionalRamp = None
    """Raise the weights from 0 at the start of the run, to their full values at its last step."""

    @property
    def streams(self) -> tuple[StreamAlignment, ...]:
        """The options of each teacher stream, the first's included; empty for a vanilla run."""
        return (self, *self.others) if self.active else ()

    @property
    def attended(self) -> StreamAlignment | None:
        """The first stream with an attention loss, None without one."""
        return next((options for options in self.streams if options.attention_weight), None)

    @property
    def labels(self) -> tuple[str, ...]:
        """A distinct name for each of ``streams``: that of its stream, with its number where an
        earlier one has the same."""
        names = [stream.stream or f"{number}" for number, stream in enumerate(self.streams)]
        return tuple(
            f"{name}.{number}" if name in names[:number] else name
            for number, name in enumerate(names)
        )

    @property
    def feature_weights(self) -> float:
        """Sum of all streams' weights of the feature loss."""
        return sum(stream.feature_weight for stream in self.streams)

    @property
    def attention_weights(self) -> float:
        """Sum of all streams' weights of the attention loss."""
        return sum(stream.attention_weight for stream in self.streams)

    @model_validator(mode="after")
    def _is_consistent(self) -> AlignmentConfig:
        if self.termination is not None and not self.active:
            raise ValueError("a run without alignment has nothing to terminate: termination none")
        if self.warmup is not None and not self.active:
            raise ValueError("a run without alignment has nothing to warm up: warmup none")
        end = self.termination
        known = end.step if isinstance(end, FixedStep) and not end.dry else None
        if self.warmup is not None and known is not None and self.warmup.steps > known:
            raise ValueError(
                f"warmup.steps {self.warmup.steps} is longer than the alignment, which ends at "
                f"step {known}"
            )
        if self.others and not self.active:
            raise ValueError(
                "both weights of the first stream are 0 and others are named: move one of others "
                "into its place, or set others to []"
            )
        for number, stream in enumerate(self.others):
            if not stream.active:
                raise ValueError(f"others.{number}: both weights are 0; leave it out")
        return self
