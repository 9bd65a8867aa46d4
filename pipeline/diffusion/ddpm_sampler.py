"""Ancestral sampling (DDPM): from noise to latents along the reversed noise chain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.diffusion.ddpm import linear_chain, respaced, reverse_step
from schemas.diffusion import DDPM_STEPS, SamplerConfig

NoiseAndVariance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, h, w), timesteps (B,) int64, labels (B,)) -> (B, 2 C, h, w)."""


@torch.no_grad()
def sample_ancestral(
    network: NoiseAndVariance,
    noise_BChw: Tensor,
    labels_B: Tensor,
    config: SamplerConfig,
    *,
    null_label: int,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """Latents (B, C, h, w) in float64 after ``config.steps`` of the 1000 steps.

    ``step_noise(i)`` returns the standard normal noise of the i-th step; the last uses none.
    The estimate of x_0 is not clipped, because latents are unbounded.
    """
    chain, timesteps = respaced(linear_chain(), config.steps)
    x = noise_BChw.double()
    for i, k in enumerate(reversed(range(config.steps))):
        noise, fraction = _guided(
            network, x.to(noise_BChw.dtype), timesteps[k], labels_B, config, null_label
        )
        step = reverse_step(chain, torch.tensor(k))
        x = step.mean(step.data(x, noise), x)
        if k:
            deviation = torch.exp(0.5 * step.learned_log_variance(fraction))
            x = x + deviation * step_noise(i).to(x)
    return x


def _guided(
    network: NoiseAndVariance,
    x: Tensor,
    timestep: int,
    labels_B: Tensor,
    config: SamplerConfig,
    null_label: int,
) -> tuple[Tensor, Tensor]:
    """Noise and variance fraction, float64.

    Guidance applies to the noise on all channels (DiT's released code uses the first three, to
    reproduce its published numbers); the variance is the conditional one. The guidance interval is
    in timestep / 1000.
    """
    step_B = torch.full((len(x),), timestep, device=x.device)
    inside = config.guidance_low <= timestep / DDPM_STEPS <= config.guidance_high
    if config.guidance == 1 or not inside:
        noise, fraction = network(x, step_B, labels_B).double().chunk(2, dim=1)
        return noise, fraction
    null = torch.full_like(labels_B, null_label)
    both = network(torch.cat([x, x]), step_B.repeat(2), torch.cat([labels_B, null])).double()
    (noise, without), (fraction, _) = (part.chunk(2) for part in both.chunk(2, dim=1))
    return without + config.guidance * (noise - without), fraction
