"""Denoising diffusion with learned variances (arXiv 2102.09672), as used to train DiT.

A noise chain is one table: alpha-bar after 0, 1, ... S steps, (S + 1,), float64, decreasing from 1.
Step k, 0 to S - 1, adds the noise between entries k and k + 1; x_k+1 is the network's input at
timestep k. All other quantities follow from the table.
"""

from __future__ import annotations

import math
from itertools import accumulate, repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from schemas.diffusion import DDPM_STEPS

BETA_FIRST, BETA_LAST = 1e-4, 0.02
"""Variances added by the first and the last step (arXiv 2006.11239, section 4)."""

HALF_BIN = 1 / 255
"""Half the distance between neighbouring 8-bit values on [-1, 1]."""
FIRST_BIN, LAST_BIN = -0.999, 0.999
"""Values beyond these belong to the outermost bins, which extend to infinity."""


def linear_chain() -> Tensor:
    """Chain of DDPM and DiT: 1000 steps with linearly increasing betas, (1001,), float64."""
    betas = torch.linspace(BETA_FIRST, BETA_LAST, DDPM_STEPS, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])


def respaced(chain: Tensor, steps: int) -> tuple[Tensor, list[int]]:
    """``steps`` evenly spaced entries of a chain, with their alpha-bar, and the timestep of
    each in the full chain; the first and last are included (one step: the last only). Raises
    ``ValueError`` for more steps than the chain has."""
    last = len(chain) - 2
    if steps > last + 1:
        raise ValueError(f"{steps} steps are more than the chain's {last + 1}")
    timesteps = [last]
    if steps > 1:
        stride = last / (
            steps - 1
        )  # summed as in the DiT repository, for the same rounding of ties
        timesteps = [round(k) for k in accumulate(repeat(stride, steps - 1), initial=0.0)]
    return torch.cat([chain[:1], chain[[k + 1 for k in timesteps]]]), timesteps


class ReverseStep(NamedTuple):
    """Coefficients of the reverse step x_k+1 to x_k, broadcastable to latents."""

    signal: Tensor
    """Weight of the data in x_k+1: sqrt(alpha-bar)."""
    noise: Tensor
    """Weight of the noise in x_k+1: sqrt(1 - alpha-bar)."""
    from_data: Tensor
    """Weight of x_0 in the mean of q(x_k | x_k+1, x_0)."""
    from_noisy: Tensor
    """Weight of x_k+1 in that mean."""
    log_variance: Tensor
    """Log variance of q(x_k | x_k+1, x_0). It is 0 at step 0, which uses that of step 1."""
    log_beta: Tensor
    """Log variance added by step k, the upper end of the learned interpolation."""

    def mixed(self, data: Tensor, noise: Tensor) -> Tensor:
        """x_k+1 from x_0 and noise."""
        return self.signal * data + self.noise * noise

    def data(self, noisy: Tensor, noise: Tensor) -> Tensor:
        """x_0 from x_k+1 and the noise in it."""
        return (noisy - self.noise * noise) / self.signal

    def mean(self, data: Tensor, noisy: Tensor) -> Tensor:
        """Mean of q(x_k | x_k+1, x_0) (arXiv 2006.11239, equation 7)."""
        return self.from_data * data + self.from_noisy * noisy

    def learned_log_variance(self, fraction: Tensor) -> Tensor:
        """The network's log variance (arXiv 2102.09672, equation 15): -1 is the lower end, 1 the
        upper; values are not clipped."""
        upper = (fraction + 1) / 2
        return upper * self.log_beta + (1 - upper) * self.log_variance


def reverse_step(chain: Tensor, step: Tensor) -> ReverseStep:
    """Coefficients of ``step`` (any shape, int64), in that shape, float64."""
    after, before = chain[step + 1], chain[step]
    beta = 1 - after / before
    with_variance = step.clamp(min=min(1, len(chain) - 2))
    return ReverseStep(
        signal=after.sqrt(),
        noise=(1 - after).sqrt(),
        from_data=before.sqrt() * beta / (1 - after),
        from_noisy=(after / before).sqrt() * (1 - before) / (1 - after),
        log_variance=_variance(chain, with_variance).log(),
        log_beta=beta.log(),
    )


def _variance(chain: Tensor, step: Tensor) -> Tensor:
    """Variance of q(x_k | x_k+1, x_0); 0 at step 0, where x_0 is known."""
    after, before = chain[step + 1], chain[step]
    return (1 - after / before) * (1 - before) / (1 - after)


class ImprovedDdpm(nn.Module):
    """L_simple + L_vlb: squared error of the noise, and the variational bound in bits per
    dimension, which trains the variance only (its mean is detached). DiT adds both without weights;
    ADM's factor S / 1000 is 1 here."""

    chain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("chain", linear_chain(), persistent=False)

    def corrupt(
        self, latents_BChw: Tensor, noise_BChw: Tensor, t_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, integer timesteps floor(1000 t) and the noise, for t uniform on [0, 1)."""
        step_B = (t_B * DDPM_STEPS).long()  # at most 999, as t < 1 in float32
        return self._step(step_B).mixed(latents_BChw, noise_BChw), step_B, noise_BChw

    def loss(
        self, prediction_B2Chw: Tensor, noisy_BChw: Tensor, step_B: Tensor, noise_BChw: Tensor
    ) -> Tensor:
        """Loss per sample, mean over dimensions: (B,), float32."""
        predicted, fraction = prediction_B2Chw.float().chunk(2, dim=1)
        step = self._step(step_B)
        data = step.data(noisy_BChw, noise_BChw)
        mean = step.mean(step.data(noisy_BChw, predicted.detach()), noisy_BChw)
        log_variance = step.learned_log_variance(fraction)
        true_mean = step.mean(data, noisy_BChw)
        nats = torch.where(
            step_B.view(-1, 1, 1, 1) == 0,
            -discretised_log_likelihood(data, mean, log_variance),
            gaussian_kl(true_mean, step.log_variance, mean, log_variance),
        )
        squared_error = (predicted - noise_BChw).square()
        return (squared_error + nats / math.log(2)).flatten(1).mean(1)

    def _step(self, step_B: Tensor) -> ReverseStep:
        numbers = reverse_step(self.chain, step_B)
        return ReverseStep(*(number.float().view(-1, 1, 1, 1) for number in numbers))


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, mean_to: Tensor, log_variance_to: Tensor
) -> Tensor:
    """Element-wise KL divergence from the first normal distribution to the second, in nats."""
    log_ratio = log_variance - log_variance_to
    distance = (mean - mean_to).square() * torch.exp(-log_variance_to)
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + distance)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability of the 8-bit bin around each ``x`` on [-1, 1], in nats.

    Written for pixels in ADM and applied unchanged, with the same bins, to latents in DiT and here.
    ADM approximates the normal distribution function by tanh; here it is exact.
    """
    scale = torch.exp(-0.5 * log_variance)
    above, below = (x - mean + HALF_BIN) * scale, (x - mean - HALF_BIN) * scale
    # bins above the mean are mirrored, because the difference of two numbers near 1 loses precision
    distance = (x - mean).abs()
    inner = torch.special.ndtr((HALF_BIN - distance) * scale) - torch.special.ndtr(
        (-HALF_BIN - distance) * scale
    )
    return torch.where(
        x < FIRST_BIN,
        torch.special.log_ndtr(above),
        torch.where(x > LAST_BIN, torch.special.log_ndtr(-below), inner.clamp(min=1e-12).log()),
    )
