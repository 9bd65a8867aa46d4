"""How noise and data are mixed in training, and how samples are drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.base import Strict

Path = Literal["linear", "cosine"]

DDPM_STEPS = 1000
"""Steps of the chain that DiT is trained on."""


class DiffusionConfig(Strict):
    """The denoising objective."""

    path: Path = "linear"
    """SiT: the interpolant between data and noise. DiT has its own schedule."""
    label_drop: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of samples trained without their class, for classifier-free guidance."""


class SamplerConfig(Strict):
    """How images are drawn from a trained student."""

    method: Literal["sde", "ode", "ode_heun", "ddpm"] = "sde"
    """SiT: Euler-Maruyama on the reverse SDE, or Euler or Heun on the probability-flow ODE. DiT:
    'ddpm', ancestral sampling with the learned variance."""
    steps: Annotated[int, Field(ge=1)] = 250
    """Network evaluations (twice as many with Heun); 'ddpm' takes so many of its 1000 steps."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance scale; 1 is none."""
    guidance_low: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Guidance is applied at times t in [low, high] only."""
    guidance_high: Annotated[float, Field(ge=0, le=1)] = 1.0
    """See guidance_low."""
    seed: int = 0
    """Seed of the starting noise and of the steps'."""

    @property
    def in_force(self) -> SamplerConfig:
        """Without an interval where there is no guidance: samplers that draw alike are equal."""
        if self.guidance != 1:
            return self
        return self.model_copy(update={"guidance_low": 0.0, "guidance_high": 1.0})

    @model_validator(mode="after")
    def _steps_exist(self) -> SamplerConfig:
        if self.method == "ddpm" and self.steps > DDPM_STEPS:
            raise ValueError(f"method ddpm has {DDPM_STEPS} steps, not {self.steps}")
        return self
