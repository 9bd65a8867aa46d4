"""Options of the denoising objective and of the samplers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.base import Strict
from schemas.fields import Name, is_none

Path = Literal["linear", "cosine"]
TimeDistribution = Literal["uniform", "lognormal"]
Prediction = Literal["velocity", "noise", "score"]

DDPM_STEPS = 1000
"""Timesteps of the diffusion that DiT is trained on."""


class Convention(Strict):
    """Meaning of a SiT's time and output."""

    path: Path = "linear"
    """The interpolant between data and noise."""
    prediction: Prediction = "velocity"
    """Output of the network; the velocity is the derivative by the network's time."""
    data_time: Literal[0, 1] = 0
    """The network's time at data; noise is at the other end. 0 in REPA, HASTE and here, 1 in SiT's
    own repository."""


CLASS_WEIGHT = 0.03
"""Weight of the class token's loss in REG (arXiv 2507.01467)."""


class DiffusionConfig(Strict):
    """The denoising objective."""

    path: Path = "linear"
    """SiT and MMDiT: the interpolant between data and noise. DiT has its own noise schedule."""
    time: TimeDistribution = Field(default="uniform", exclude_if=lambda value: value == "uniform")
    """SiT and MMDiT: distribution of the training times; 'lognormal' is that of the ratio of noise
    to data (REPA's --weighting lognormal)."""
    label_drop: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Probability of training a sample without its class or caption, for classifier-free
    guidance."""
    class_weight: Annotated[float, Field(ge=0)] = Field(
        default=CLASS_WEIGHT, exclude_if=lambda weight: weight == CLASS_WEIGHT
    )
    """Weight of the denoising loss of the class token, with student.class_token (beta of REG)."""
    class_stream: Name | None = Field(default=None, exclude_if=is_none)
    """Stream of class tokens, with student.class_token, where the store holds several."""
    text_stream: Name | None = Field(default=None, exclude_if=is_none)
    """MMDiT: stream of captions, where the store holds several."""


class SamplerConfig(Strict):
    """Sampling of images from a trained student."""

    method: Literal["sde", "ode", "ode_heun", "ddpm"] = "sde"
    """SiT and MMDiT: Euler-Maruyama on the reverse SDE, or Euler or Heun on the probability-flow
    ODE. DiT: 'ddpm', ancestral sampling with the learned variance."""
    steps: Annotated[int, Field(ge=1)] = 250
    """Sampling steps: one network evaluation each, two with Heun; for 'ddpm' at most 1000."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance scale; 1: no guidance."""
    guidance_low: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Lowest time t at which guidance is applied."""
    guidance_high: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Highest time t at which guidance is applied."""
    class_guidance: Annotated[float, Field(ge=0)] | None = Field(default=None, exclude_if=is_none)
    """Guidance scale of a class token that is drawn with the image (student.class_token), in the
    same interval; 0: not guided. Default: 'guidance'. Without effect where that is 1."""
    seed: int = 0
    """Seed of the initial noise and of the noise of the steps."""

    @property
    def in_force(self) -> SamplerConfig:
        """A copy with the default interval and class guidance if there is no guidance, so that
        samplers that give the same images are equal."""
        if self.guidance != 1:
            own = None if self.class_guidance == self.guidance else self.class_guidance
            return self.model_copy(update={"class_guidance": own})
        defaults = {"guidance_low": 0.0, "guidance_high": 1.0, "class_guidance": None}
        return self.model_copy(update=defaults)

    @model_validator(mode="after")
    def _steps_exist(self) -> SamplerConfig:
        if self.method == "ddpm" and self.steps > DDPM_STEPS:
            raise ValueError(f"method ddpm has {DDPM_STEPS} steps, not {self.steps}")
        return self
