"""How noise and data are mixed in training, and how samples are drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Strict

Path = Literal["linear", "cosine"]


class DiffusionConfig(Strict):
    """The denoising objective."""

    path: Path = "linear"
    """Interpolant between data and noise."""
    label_drop: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of samples trained without their class, for classifier-free guidance."""


class SamplerConfig(Strict):
    """How images are drawn from a trained student."""

    method: Literal["sde", "ode", "ode_heun"] = "sde"
    """Euler-Maruyama on the reverse SDE, or Euler or Heun on the probability-flow ODE."""
    steps: Annotated[int, Field(ge=1)] = 250
    """Network evaluations (twice as many with Heun)."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance scale; 1 is none."""
    guidance_low: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Guidance is applied at times t in [low, high] only."""
    guidance_high: Annotated[float, Field(ge=0, le=1)] = 1.0
    """See guidance_low."""
    seed: int = 0
    """Seed of the starting noise and of the SDE's."""
