"""Samplers from noise to latents: SiT along the probability-flow ODE or the reverse SDE (arXiv
2401.08740), DiT by ancestral sampling.

State and step arithmetic are float64; the network input has the dtype of the initial noise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.diffusion.ddpm_sampler import sample_ancestral
from pipeline.diffusion.interpolant import coefficients
from schemas.diffusion import Path, SamplerConfig

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, h, w), t (B,), labels (B,)) -> velocity (B, C, h, w)."""

LAST_SDE_TIME = 0.04
"""Time at which the SDE ends with one step without noise to t = 0, as in SiT, REPA and HASTE."""


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise_BChw: Tensor,
    labels_B: Tensor,
    config: SamplerConfig,
    *,
    null_label: int,
    path: Path = "linear",
    step_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Latents (B, C, h, w) in float64, scaled as in training.

    ``step_noise(i)`` returns the standard normal noise of step i; the ODE needs none. With method
    "ddpm", ``velocity`` is DiT's network, see ``sample_ancestral``. Raises ``ValueError`` if
    "sde" or "ddpm" has no ``step_noise``.
    """
    if config.method == "ddpm":
        if step_noise is None:
            raise ValueError("the DDPM sampler needs step_noise")
        return sample_ancestral(
            velocity, noise_BChw, labels_B, config, null_label=null_label, step_noise=step_noise
        )
    guided = partial(_guided_velocity, velocity, labels_B, config, null_label, noise_BChw.dtype)
    if config.method == "sde":
        if step_noise is None:
            raise ValueError("the SDE sampler needs step_noise")
        return _euler_maruyama(guided, noise_BChw.double(), config, path, step_noise)
    return _ode(guided, noise_BChw.double(), config)


def sde_times(steps: int) -> Tensor:
    """(steps + 1,) float64: evenly spaced from 1 to 0.04, then 0."""
    times = torch.linspace(1.0, LAST_SDE_TIME, steps, dtype=torch.float64)
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def _ode(guided: Callable[..., Tensor], x: Tensor, config: SamplerConfig) -> Tensor:
    times = torch.linspace(1, 0, config.steps + 1, dtype=torch.float64).tolist()
    heun = config.method == "ode_heun"
    for i, (now, after) in enumerate(pairwise(times)):
        slope = guided(x, now, interval_time=now)
        ahead = x + (after - now) * slope
        if heun and i < config.steps - 1:
            # as in the reference, the start of the step decides about guidance
            slope = 0.5 * slope + 0.5 * guided(ahead, after, interval_time=now)
            ahead = x + (after - now) * slope
        x = ahead
    return x


def _euler_maruyama(
    guided: Callable[..., Tensor],
    x: Tensor,
    config: SamplerConfig,
    path: Path,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    times = sde_times(config.steps).tolist()
    for i, (now, after) in enumerate(pairwise(times)):
        diffusion = 2 * now
        slope = guided(x, now, interval_time=now)
        drift = slope - 0.5 * diffusion * score(path, slope, x, now)
        x_mean = x + drift * (after - now)
        if i == config.steps - 1:
            return x_mean
        noise = step_noise(i).to(x) * abs(after - now) ** 0.5
        x = x_mean + diffusion**0.5 * noise
    return x


def score(path: Path, velocity: Tensor, x: Tensor, t: float) -> Tensor:
    """Gradient of the log density of x_t, from the velocity (arXiv 2401.08740, equation 9)."""
    # on the CPU, because a copy to a GPU waits for its queued work
    c = coefficients(path, torch.tensor(t, dtype=x.dtype))
    ratio = c.alpha / c.d_alpha
    variance = c.sigma**2 - ratio * c.d_sigma * c.sigma
    return (ratio * velocity - x) / variance


def _guided_velocity(
    velocity: Velocity,
    labels_B: Tensor,
    config: SamplerConfig,
    null_label: int,
    dtype: torch.dtype,
    x: Tensor,
    t: float,
    *,
    interval_time: float,
) -> Tensor:
    """Classifier-free guidance inside its interval (arXiv 2404.07724), both ends included.

    The SDE's drift is affine in the velocity, so guidance of the velocity also guides the drift.
    """
    batch = len(x)
    t_B = torch.full((batch,), t, dtype=dtype, device=x.device)
    inside = config.guidance_low <= interval_time <= config.guidance_high
    if config.guidance == 1 or not inside:
        return velocity(x.to(dtype), t_B, labels_B).double()
    null = torch.full_like(labels_B, null_label)
    both = velocity(
        torch.cat([x, x]).to(dtype), torch.cat([t_B, t_B]), torch.cat([labels_B, null])
    ).double()
    with_label, without = both.chunk(2)
    return without + config.guidance * (with_label - without)
