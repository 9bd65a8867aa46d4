"""The ancestral sampler on data whose optimal network is known."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.diffusion.ddpm import linear_chain, respaced, reverse_step
from pipeline.diffusion.samplers import sample
from schemas.diffusion import SamplerConfig

MEAN, VARIANCE = 0.7, 0.36


def config(**values: object) -> SamplerConfig:
    return SamplerConfig.model_validate({"method": "ddpm", **values})


def optimal_network(steps: int, mean: float = MEAN) -> object:
    """What minimises the objective where every latent is N(mean, VARIANCE): E[noise | x_k+1], and
    the fraction whose variance is Var[x_k | x_k+1]."""
    chain, timesteps = respaced(linear_chain(), steps)

    def network(x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        k = torch.tensor(timesteps.index(int(timestep[0])))
        step, a = reverse_step(chain, k), chain[k + 1]
        total = a * VARIANCE + 1 - a
        noise = (1 - a).sqrt() * (x - a.sqrt() * mean) / total
        data_variance = VARIANCE * (1 - a) / total  # of x_0, given x_k+1
        log_variance = (step.log_variance.exp() + step.from_data**2 * data_variance).log()
        fraction = (log_variance - step.log_variance) / (step.log_beta - step.log_variance)
        return torch.cat([noise, (2 * fraction - 1).expand_as(x)], dim=1)

    return network


@pytest.mark.parametrize("steps", [2, 10, 250, 1000])
def test_recovers_a_gaussian_exactly(steps: int) -> None:
    """The chain is affine in the starting noise and in each step's, so unit impulses measure it:
    no statistics, no tolerance but rounding. Started from the true law of x_T it must end in the
    law of the last step's answer, E[x_0 | x_1], which is the data's but for Var[x_0 | x_1]."""
    count = steps + 2  # nothing, the start, and each step's noise (the last takes none)
    start = torch.zeros(count, 1, 1, 1, dtype=torch.float64)
    start[1] = 1

    def impulse(i: int) -> Tensor:
        noise = torch.zeros_like(start)
        noise[i + 2] = 1
        return noise

    labels = torch.zeros(count, dtype=torch.int64)
    ends = sample(
        optimal_network(steps), start, labels, config(steps=steps), null_label=1, step_noise=impulse
    ).flatten()
    offset, weights = ends[0], ends[1:] - ends[0]

    chain, _ = respaced(linear_chain(), steps)
    first, last = chain[1], chain[-1]
    mean = offset + weights[0] * last.sqrt() * MEAN
    variance = weights[0] ** 2 * (last * VARIANCE + 1 - last) + weights[1:].square().sum()
    unexplained = VARIANCE * (1 - first) / (first * VARIANCE + 1 - first)
    assert float(mean) == pytest.approx(MEAN, abs=1e-9)
    assert float(variance) == pytest.approx(VARIANCE - float(unexplained), abs=1e-9)
    assert weights[-1] == 0


def test_network_is_told_timesteps_of_the_long_chain() -> None:
    told: list[int] = []

    def network(x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        assert timestep.dtype == torch.int64
        assert x.dtype == torch.float32
        told.append(int(timestep[0]))
        return torch.zeros(len(x), 2 * x.shape[1], *x.shape[2:])

    noise = torch.randn(2, 3, 2, 2)
    asked: list[int] = []

    def step_noise(i: int) -> Tensor:
        asked.append(i)
        return torch.zeros_like(noise)

    labels = torch.zeros(2, dtype=torch.int64)
    latents = sample(network, noise, labels, config(steps=4), null_label=9, step_noise=step_noise)
    assert told == [999, 666, 333, 0]
    assert asked == [0, 1, 2]
    assert latents.dtype == torch.float64


def test_guidance_moves_the_noise_of_all_channels_and_leaves_the_variance() -> None:
    """Noise is the label's number, the null label's is 0: scale 3 triples it. The variance answers
    with the label alone, so that a guided run equals an unguided one with a tripled noise."""

    def network(factor: float) -> object:
        def predict(x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
            kind = torch.where(labels == 9, 0.0, labels + 1.0).to(x).view(-1, 1, 1, 1)
            return torch.cat([(factor * 0.01 * kind).expand_as(x), (0.1 * kind).expand_as(x)], 1)

        return predict

    noise, labels = torch.randn(2, 4, 2, 2, dtype=torch.float64), torch.tensor([0, 1])
    numbers = [torch.randn_like(noise) for _ in range(7)]

    def draw(factor: float, **guidance: float) -> Tensor:
        return sample(
            network(factor),
            noise,
            labels,
            config(steps=8, **guidance),
            null_label=9,
            step_noise=numbers.__getitem__,
        )

    torch.testing.assert_close(draw(1, guidance=3.0), draw(3))
    torch.testing.assert_close(draw(1, guidance=3.0, guidance_low=1.0), draw(1))
    assert not torch.allclose(draw(1, guidance=3.0, guidance_high=0.5), draw(3))


def test_more_steps_than_the_chain_has_are_refused() -> None:
    with pytest.raises(ValidationError, match="method ddpm has 1000 steps, not 1001"):
        config(steps=1001)
