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
from schemas.diffusion import Convention, Path, SamplerConfig

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, h, w), the network's time (B,), labels (B,)) -> its prediction (B, C, h, w)."""

LAST_SDE_TIME = 0.04
"""Time at which the SDE ends with one step without noise to t = 0, as in SiT, REPA and HASTE."""
EDGE = 1e-3
"""Distance from t = 0 and 1 within which noise and score are not converted to a velocity, because
the conversion is singular there; as in SiT."""


@torch.no_grad()
def sample(
    network: Network,
    noise_BChw: Tensor,
    labels_B: Tensor,
    config: SamplerConfig,
    *,
    null_label: int | None,
    path: Path = "linear",
    convention: Convention | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Latents (B, C, h, w) in float64, scaled as in training.

    ``step_noise(i)`` returns the standard normal noise of step i; the ODE needs none. With method
    "ddpm", ``network`` is DiT's, see ``sample_ancestral``. ``convention`` is the meaning of another
    network's time and output, by default a velocity along ``path`` with data at time 0. Raises
    ``ValueError`` if "sde" or "ddpm" has no ``step_noise``, or guidance no ``null_label``.
    """
    if config.guidance != 1 and null_label is None:
        raise ValueError("guidance needs a null_label")
    null_label = -1 if null_label is None else null_label  # not used without guidance
    if config.method == "ddpm":
        if step_noise is None:
            raise ValueError("the DDPM sampler needs step_noise")
        return sample_ancestral(
            network, noise_BChw, labels_B, config, null_label=null_label, step_noise=step_noise
        )
    convention = convention or Convention(path=path)
    first, last = (1.0, 0.0) if convention.prediction == "velocity" else (1 - EDGE, EDGE)
    guided = partial(
        _guided_velocity, network, convention, labels_B, config, null_label, noise_BChw.dtype
    )
    if config.method == "sde":
        if step_noise is None:
            raise ValueError("the SDE sampler needs step_noise")
        times = sde_times(config.steps, first)
        return _euler_maruyama(guided, noise_BChw.double(), times, convention.path, step_noise)
    times = torch.linspace(first, last, config.steps + 1, dtype=torch.float64)
    return _ode(guided, noise_BChw.double(), times, heun=config.method == "ode_heun")


def sde_times(steps: int, first: float = 1.0) -> Tensor:
    """(steps + 1,) float64: evenly spaced from ``first`` to 0.04, then 0."""
    times = torch.linspace(first, LAST_SDE_TIME, steps, dtype=torch.float64)
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def _ode(guided: Callable[..., Tensor], x: Tensor, times: Tensor, *, heun: bool) -> Tensor:
    for i, (now, after) in enumerate(pairwise(times.tolist())):
        slope = guided(x, now, interval_time=now)
        ahead = x + (after - now) * slope
        if heun and i < len(times) - 2:
            # as in the reference, the start of the step decides about guidance
            slope = 0.5 * slope + 0.5 * guided(ahead, after, interval_time=now)
            ahead = x + (after - now) * slope
        x = ahead
    return x


def _euler_maruyama(
    guided: Callable[..., Tensor],
    x: Tensor,
    times: Tensor,
    path: Path,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    for i, (now, after) in enumerate(pairwise(times.tolist())):
        diffusion = 2 * now
        slope = guided(x, now, interval_time=now)
        drift = slope - 0.5 * diffusion * score(path, slope, x, now)
        x_mean = x + drift * (after - now)
        if i == len(times) - 2:
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


def velocity_of(convention: Convention, output: Tensor, x: Tensor, t: float) -> Tensor:
    """dx/dt with data at t = 0, from a network's output at ``x`` and the sampler's time ``t``.

    The score of x_t is -noise / sigma (arXiv 2401.08740, equation 7).
    """
    if convention.prediction == "velocity":
        return -output if convention.data_time else output
    c = coefficients(convention.path, torch.tensor(t, dtype=x.dtype))
    noise = output if convention.prediction == "noise" else -c.sigma * output
    return c.d_alpha / c.alpha * (x - c.sigma * noise) + c.d_sigma * noise


def _guided_velocity(
    network: Network,
    convention: Convention,
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

    The SDE's drift and the velocity are affine in the network's output, so guidance of the output
    also guides them.
    """
    batch = len(x)
    time = 1 - t if convention.data_time else t
    t_B = torch.full((batch,), time, dtype=dtype, device=x.device)
    inside = config.guidance_low <= interval_time <= config.guidance_high
    if config.guidance == 1 or not inside:
        return velocity_of(convention, network(x.to(dtype), t_B, labels_B).double(), x, t)
    null = torch.full_like(labels_B, null_label)
    both = network(
        torch.cat([x, x]).to(dtype), torch.cat([t_B, t_B]), torch.cat([labels_B, null])
    ).double()
    with_label, without = both.chunk(2)
    guided = without + config.guidance * (with_label - without)
    return velocity_of(convention, guided, x, t)
