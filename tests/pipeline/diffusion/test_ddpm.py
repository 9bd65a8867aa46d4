"""The improved-DDPM objective against closed forms, in float64 unless a test says otherwise."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pipeline.diffusion.ddpm import (
    HALF_BIN,
    ImprovedDdpm,
    discretised_log_likelihood,
    gaussian_kl,
    linear_chain,
    respaced,
    reverse_step,
)
from schemas.diffusion import DDPM_STEPS

EXACT = {"rtol": 1e-10, "atol": 0.0}
"""float64, a few operations apart."""
SINGLE = {"rtol": 2e-5, "atol": 1e-6}
"""The objective computes in float32; a small KL is a difference of numbers near 1."""


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_chain_is_the_published_one() -> None:
    chain = linear_chain()
    betas = 1 - chain[1:] / chain[:-1]
    assert chain.shape == (1001,)
    assert chain[0] == 1
    expected = torch.tensor([1e-4, 0.02], dtype=torch.float64)
    torch.testing.assert_close(betas[[0, -1]], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(betas.diff(), betas.diff().mean().expand(999), rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 2, 500, 999])
def test_posterior_is_that_of_two_gaussians(k: int) -> None:
    """Bayes: x_k ~ N(sqrt(a_k) x_0, 1 - a_k) seen through x_k+1 ~ N(sqrt(1 - b) x_k, b); precisions
    add up."""
    chain = linear_chain()
    step = reverse_step(chain, torch.tensor(k))
    before, beta = chain[k], 1 - chain[k + 1] / chain[k]
    x_0, noisy = normals(50), normals(50, seed=1)
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (before.sqrt() * x_0 / (1 - before) + (1 - beta).sqrt() * noisy / beta) / precision
    torch.testing.assert_close(step.mean(x_0, noisy), mean, **EXACT)
    # 1 - a_k has lost up to four digits where a_k is near 1
    torch.testing.assert_close(step.log_variance.exp(), 1 / precision, **EXACT)
    torch.testing.assert_close(step.log_beta.exp(), beta, **EXACT)


def test_first_step_knows_the_data_and_borrows_a_variance() -> None:
    step, second = (reverse_step(linear_chain(), torch.tensor(k)) for k in (0, 1))
    torch.testing.assert_close(step.mean(normals(9), normals(9, seed=1)), normals(9), **EXACT)
    assert step.log_variance == second.log_variance
    assert step.log_beta != second.log_beta


def test_learned_variance_runs_between_its_ends() -> None:
    step = reverse_step(linear_chain(), torch.tensor(400))
    ends = step.learned_log_variance(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.stack([step.log_variance, step.log_beta]), **EXACT)
    middle = step.learned_log_variance(torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(middle, ends.mean(), **EXACT)


def test_corrupted_latents_are_the_chain_s_marginals() -> None:
    """Mean and variance of 200k draws, within five standard errors."""
    objective, count = ImprovedDdpm(), 200_000
    for t, k in ((0.0, 0), (0.25, 250), (0.9999, 999)):
        data = torch.full((1, 1, 1, count), 1.5)
        noise = normals(1, 1, 1, count).float()
        noisy, step, target = objective.corrupt(data, noise, torch.tensor([t]))
        assert step.tolist() == [k]
        assert step.dtype == torch.int64
        assert target is noise
        alpha_bar = linear_chain()[k + 1]
        variance = 1 - alpha_bar
        assert abs(noisy.mean() - 1.5 * alpha_bar.sqrt()) < 5 * (variance / count).sqrt()
        assert abs(noisy.var() - variance) < 5 * variance * (2 / count) ** 0.5


def test_mixing_step_by_step_gives_the_closed_form() -> None:
    """x_k+1 = sqrt(1 - b_k) x_k + sqrt(b_k) e_k, its weights pushed through 1000 single steps."""
    chain = linear_chain()
    signal, variance = 1.0, 0.0
    for k in range(DDPM_STEPS):
        beta = float(1 - chain[k + 1] / chain[k])
        signal, variance = signal * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        step = reverse_step(chain, torch.tensor(k))
        assert float(step.signal) == pytest.approx(signal, rel=1e-9)
        assert float(step.noise) ** 2 == pytest.approx(variance, rel=1e-9)


def test_times_cover_every_step_and_never_one_more() -> None:
    objective = ImprovedDdpm()
    last = 1 - 2.0**-24  # the largest float32 that the draw of t can be
    t = torch.tensor([*((k + 0.5) / DDPM_STEPS for k in range(DDPM_STEPS)), last])
    zeros = torch.zeros(len(t), 1, 1, 1)
    _, step, _ = objective.corrupt(zeros, zeros, t)
    assert step.tolist() == [*range(DDPM_STEPS), 999]
    _, step, _ = objective.corrupt(zeros[:4], zeros[:4], torch.tensor([0.02, 0.1, 0.5, 0.8]))
    assert step.tolist() == [20, 100, 500, 800]  # the gradient trigger's times


def test_kl_is_the_closed_form() -> None:
    mean, to = normals(100), normals(100, seed=1)
    log_variance, log_variance_to = normals(100, seed=2), normals(100, seed=3)
    expected = kl_divergence(
        Normal(mean, (log_variance / 2).exp()), Normal(to, (log_variance_to / 2).exp())
    )
    torch.testing.assert_close(gaussian_kl(mean, log_variance, to, log_variance_to), expected)
    assert not gaussian_kl(mean, log_variance, mean, log_variance).any()


def test_bins_are_normal_probabilities_and_sum_to_one() -> None:
    """The 256 bins of 8-bit values tile the line: one probability each, together 1."""
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, log_variance in ((0.1, -3.0), (-0.97, -6.0), (1.3, -1.0)):
        args = torch.full_like(values, mean), torch.full_like(values, log_variance)
        log_probs = discretised_log_likelihood(values, *args)
        assert float(log_probs.exp().sum()) == pytest.approx(1, abs=1e-9)
        normal = Normal(args[0], (args[1] / 2).exp())
        inner = normal.cdf(values + HALF_BIN) - normal.cdf(values - HALF_BIN)
        # below, the plain difference of two distribution functions has few digits left
        likely = (inner > 1e-8) & (values.abs() < 0.999)
        assert likely.any()
        torch.testing.assert_close(log_probs[likely], inner[likely].log(), rtol=0, atol=1e-7)


def test_far_values_have_finite_gradients() -> None:
    """At other steps than 0 the term is discarded, but its gradient must not be NaN there."""
    x = torch.tensor([-5.0, -0.5, 0.5, 5.0])
    log_variance = torch.full((4,), -10.0, requires_grad=True)
    for mean in (-9.0, 0.0, 9.0):
        total = discretised_log_likelihood(x, torch.full((4,), mean), log_variance).sum()
        (gradient,) = torch.autograd.grad(total, log_variance)
        assert total.isfinite()
        assert gradient.isfinite().all()


def a_batch(t: list[float]) -> tuple[ImprovedDdpm, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An objective, latents, noisy latents, steps, noise and a prediction, all float32."""
    objective, shape = ImprovedDdpm(), (len(t), 4, 4, 4)
    data, noise = normals(*shape, seed=1).float(), normals(*shape, seed=2).float()
    noisy, step, _ = objective.corrupt(data, noise, torch.tensor(t))
    error, fraction = normals(*shape, seed=3).float(), normals(*shape, seed=4).float()
    prediction = torch.cat([noise + 0.3 * error, 0.5 * fraction], dim=1)
    return objective, data, noisy, step, noise, prediction


def test_loss_is_squared_error_plus_bits_per_dimension() -> None:
    """Every number again, in float64, from the distributions of torch."""
    objective, data, noisy, step_B, noise, prediction = a_batch([0.0, 0.0015, 0.3, 0.9995])
    got = objective.loss(prediction, noisy, step_B, noise)
    assert got.shape == (4,)
    assert got.dtype == torch.float32
    predicted, fraction = prediction.double().chunk(2, dim=1)
    data, noise = data.double(), noise.double()
    for i, k in enumerate(step_B.tolist()):
        step = reverse_step(linear_chain(), torch.tensor(k))
        x = step.mixed(data[i], noise[i])
        model = Normal(
            step.mean(step.data(x, predicted[i]), x),
            (step.learned_log_variance(fraction[i]) / 2).exp(),
        )
        if k == 0:
            below = torch.where(data[i] < -0.999, -math.inf, data[i] - HALF_BIN)
            above = torch.where(data[i] > 0.999, math.inf, data[i] + HALF_BIN)
            nats = -(model.cdf(above) - model.cdf(below)).log()
        else:
            truth = Normal(step.mean(data[i], x), (step.log_variance / 2).exp())
            nats = kl_divergence(truth, model)
        squared_error = (predicted[i] - noise[i]).square().mean()
        expected = squared_error + nats.mean() / math.log(2)
        torch.testing.assert_close(got[i].double(), expected, **SINGLE)


def test_bound_trains_the_variance_and_squared_error_the_noise() -> None:
    """The gradient of the noise half is that of the squared error alone."""
    objective, _, noisy, step, noise, prediction = a_batch([0.0, 0.2, 0.7])
    prediction.requires_grad_()
    objective.loss(prediction, noisy, step, noise).sum().backward()
    assert prediction.grad is not None
    of_noise, of_variance = prediction.grad.chunk(2, dim=1)
    predicted = prediction.detach().chunk(2, dim=1)[0]
    torch.testing.assert_close(of_noise, 2 * (predicted - noise) / noise[0].numel())
    assert of_variance.abs().amin(dim=(1, 2, 3)).gt(0).all()


def test_perfect_prediction_costs_nothing_but_the_first_bin() -> None:
    objective, _, noisy, step, noise, _ = a_batch([0.0, 0.001, 0.5, 0.999])
    prediction = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    loss = objective.loss(prediction, noisy, step, noise)
    assert loss[0] > 0.1
    # float32: the two means differ by rounding, against a deviation of 0.007 to 0.1
    assert loss[1:].abs().max() < 1e-6


def test_half_precision_predictions_cost_what_they_are() -> None:
    objective, _, noisy, step, noise, prediction = a_batch([0.1, 0.6])
    half = prediction.bfloat16()
    got = objective.loss(half, noisy, step, noise)
    assert torch.equal(got, objective.loss(half.float(), noisy, step, noise))


@pytest.mark.parametrize("steps", [1, 2, 10, 250, 1000])
def test_respacing_keeps_alpha_bar(steps: int) -> None:
    chain = linear_chain()
    short, timesteps = respaced(chain, steps)
    assert len(short) == steps + 1
    assert timesteps == sorted(set(timesteps))
    assert timesteps[-1] == 999
    assert steps == 1 or timesteps[0] == 0
    assert short[0] == 1
    assert torch.equal(short[1:], chain[1:][timesteps])
    gaps = {after - before for before, after in pairwise(timesteps)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_respacing_beyond_the_chain_is_refused() -> None:
    with pytest.raises(ValueError, match="1001 steps are more than the chain's 1000"):
        respaced(linear_chain(), 1001)
