"""Interpolants (arXiv 2401.08740, section 2): t = 0 is data, t = 1 is noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from schemas.diffusion import Path


class Coefficients(NamedTuple):
    """x_t = alpha x + sigma noise, and the time derivatives of alpha and sigma."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def coefficients(path: Path, t: Tensor) -> Coefficients:
    """``linear``: alpha = 1 - t, sigma = t. ``cosine``: alpha = cos(pi t / 2), sigma = sin."""
    if path == "linear":
        return Coefficients(1 - t, t, torch.full_like(t, -1), torch.ones_like(t))
    half_pi = math.pi / 2
    cos, sin = torch.cos(t * half_pi), torch.sin(t * half_pi)
    return Coefficients(cos, sin, -half_pi * sin, half_pi * cos)


def interpolate(
    path: Path, latents_BChw: Tensor, noise_BChw: Tensor, t_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy latents x_t and their velocity dx_t/dt, the target of the denoising loss; also of class
    tokens (B, E)."""
    c = coefficients(path, t_B.view(-1, *[1] * (latents_BChw.dim() - 1)))
    x_t = c.alpha * latents_BChw + c.sigma * noise_BChw
    velocity = c.d_alpha * latents_BChw + c.d_sigma * noise_BChw
    return x_t, velocity


def denoising_loss(velocity_BChw: Tensor, target_BChw: Tensor) -> Tensor:
    """Mean squared error per sample: (B,), float32."""
    return (velocity_BChw.float() - target_BChw).square().flatten(1).mean(1)
