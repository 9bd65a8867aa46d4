"""Samplers from noise to latents: SiT and MM-DiT along the probability-flow ODE or the reverse SDE
(arXiv 2401.08740), DiT by ancestral sampling.

State and step arithmetic are float64; the network input has the dtype of the initial noise. A
state is one tensor, or two that are denoised together, the image and a class token (REG, arXiv
2507.01467): they share times and network, and each has noise and a guidance scale of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.diffusion.ddpm_sampler import sample_ancestral
from pipeline.diffusion.interpolant import coefficients
from schemas.diffusion import Convention, Path, SamplerConfig

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, h, w), the network's time (B,), labels) -> its prediction (B, C, h, w). Labels are
numbers of classes (B,) or, of MM-DiT, embeddings of captions (B, T, E)."""
NullLabel = int | Tensor | None
"""Label that guidance leads away from: the number of "no class", or the embedding (T, E) of the
null caption or of a negative prompt; None where there is none."""
State = Sequence[Tensor]
"""The image (B, C, h, w); after it, if the network denoises one, the class token (B, E)."""
JointNetwork = Callable[[State, Tensor, Tensor], State]
"""(state, the network's time (B,), labels) -> a prediction for each tensor of the state."""

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
    null_label: NullLabel,
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
    if config.method == "ddpm":
        if step_noise is None:
            raise ValueError("the DDPM sampler needs step_noise")
        null = null_label if isinstance(null_label, int) else -1  # not used without guidance
        return sample_ancestral(
            network, noise_BChw, labels_B, config, null_label=null, step_noise=step_noise
        )
    (latents,) = sample_jointly(
        lambda state, t, y: [network(state[0], t, y)],
        [noise_BChw],
        labels_B,
        config,
        null_label=null_label,
        convention=convention or Convention(path=path),
        step_noise=None if step_noise is None else lambda step: [step_noise(step)],
    )
    return latents


@torch.no_grad()
def sample_jointly(
    network: JointNetwork,
    noise: State,
    labels_B: Tensor,
    config: SamplerConfig,
    *,
    null_label: NullLabel,
    convention: Convention,
    step_noise: Callable[[int], State] | None = None,
) -> list[Tensor]:
    """``sample`` of a SiT, for all tensors of a state. The image is guided with ``guidance``, the
    class token with ``class_guidance``, in the same interval.

    REG has the SDE only; here the ODE is that of the joint state.
    """
    if config.guidance != 1 and null_label is None:
        raise ValueError("guidance needs a null_label")
    first, last = (1.0, 0.0) if convention.prediction == "velocity" else (1 - EDGE, EDGE)
    guided = partial(
        _guided_velocity, network, convention, labels_B, config, null_label, noise[0].dtype
    )
    state = [x.double() for x in noise]
    if config.method == "sde":
        if step_noise is None:
            raise ValueError("the SDE sampler needs step_noise")
        times = sde_times(config.steps, first)
        return _euler_maruyama(guided, state, times, convention.path, step_noise)
    times = torch.linspace(first, last, config.steps + 1, dtype=torch.float64)
    return _ode(guided, state, times, heun=config.method == "ode_heun")


def sde_times(steps: int, first: float = 1.0) -> Tensor:
    """(steps + 1,) float64: evenly spaced from ``first`` to 0.04, then 0."""
    times = torch.linspace(first, LAST_SDE_TIME, steps, dtype=torch.float64)
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def _ode(
    guided: Callable[..., list[Tensor]], state: list[Tensor], times: Tensor, *, heun: bool
) -> list[Tensor]:
    for i, (now, after) in enumerate(pairwise(times.tolist())):
        slopes = guided(state, now, interval_time=now)
        ahead = [x + (after - now) * slope for x, slope in zip(state, slopes, strict=True)]
        if heun and i < len(times) - 2:
            # as in the reference, the start of the step decides about guidance
            ends = guided(ahead, after, interval_time=now)
            slopes = [0.5 * slope + 0.5 * end for slope, end in zip(slopes, ends, strict=True)]
            ahead = [x + (after - now) * slope for x, slope in zip(state, slopes, strict=True)]
        state = ahead
    return state


def _euler_maruyama(
    guided: Callable[..., list[Tensor]],
    state: list[Tensor],
    times: Tensor,
    path: Path,
    step_noise: Callable[[int], State],
) -> list[Tensor]:
    for i, (now, after) in enumerate(pairwise(times.tolist())):
        diffusion = 2 * now
        means = []
        for x, slope in zip(state, guided(state, now, interval_time=now), strict=True):
            drift = slope - 0.5 * diffusion * score(path, slope, x, now)
            means.append(x + drift * (after - now))
        if i == len(times) - 2:
            return means
        state = [
            mean + diffusion**0.5 * (noise.to(mean) * abs(after - now) ** 0.5)
            for mean, noise in zip(means, step_noise(i), strict=True)
        ]
    return state


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
    network: JointNetwork,
    convention: Convention,
    labels_B: Tensor,
    config: SamplerConfig,
    null_label: NullLabel,
    dtype: torch.dtype,
    state: list[Tensor],
    t: float,
    *,
    interval_time: float,
) -> list[Tensor]:
    """Classifier-free guidance inside its interval (arXiv 2404.07724), both ends included.

    The SDE's drift and the velocity are affine in the network's output, so guidance of the output
    also guides them. A scale of 0 for the class token leaves it unguided, as in REG.
    """
    time = 1 - t if convention.data_time else t
    t_B = torch.full((len(labels_B),), time, dtype=dtype, device=state[0].device)
    inside = config.guidance_low <= interval_time <= config.guidance_high
    if config.guidance == 1 or not inside:
        outputs = network([x.to(dtype) for x in state], t_B, labels_B)
        return [
            velocity_of(convention, output.double(), x, t)
            for output, x in zip(outputs, state, strict=True)
        ]
    assert null_label is not None
    if isinstance(null_label, Tensor):
        null = null_label.expand_as(labels_B)
    else:
        null = torch.full_like(labels_B, null_label)
    doubled = [torch.cat([x, x]).to(dtype) for x in state]
    outputs = network(doubled, torch.cat([t_B, t_B]), torch.cat([labels_B, null]))
    of_class = config.guidance if config.class_guidance is None else config.class_guidance
    velocities = []
    for output, x, scale in zip(outputs, state, (config.guidance, of_class), strict=False):
        with_label, without = output.double().chunk(2)
        guided = without + scale * (with_label - without) if scale else with_label
        velocities.append(velocity_of(convention, guided, x, t))
    return velocities
