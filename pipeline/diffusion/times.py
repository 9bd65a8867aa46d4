"""Distributions of the training times."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from schemas.diffusion import DiffusionConfig, Path

HALF_STEP = 2.0**-25
"""Half of the distance between two of the uniform float32 numbers in [0, 1) that numpy draws."""


def times_of(diffusion: DiffusionConfig, uniform_B: Tensor) -> Tensor:
    """Times in [0, 1) of the configured distribution, from uniform float32 numbers in [0, 1), so
    that other draws of a sample do not depend on it."""
    if diffusion.time == "uniform":
        return uniform_B
    normal = torch.special.ndtri(uniform_B.double() + HALF_STEP)
    return lognormal_times(diffusion.path, normal).to(uniform_B.dtype)


def lognormal_times(path: Path, normal_B: Tensor) -> Tensor:
    """Times at which the ratio of noise to data, sigma / alpha, is exp(normal) (EDM, arXiv
    2206.00364, section 5; REPA's --weighting lognormal)."""
    ratio = normal_B.exp()
    return ratio / (1 + ratio) if path == "linear" else torch.atan(ratio) * (2 / math.pi)
