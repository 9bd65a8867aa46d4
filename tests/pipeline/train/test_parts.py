"""The parts of the training core."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.distributed.process_group import ProcessGroup
from pipeline.models.ema import Ema, catch_up
from pipeline.store import SampleOrder, Store
from pipeline.train.gradient_probe import GradientProbe
from pipeline.train.noise import draw
from pipeline.train.trainer import Trainer
from schemas.run import RunConfig


def test_draws_depend_on_position_alone() -> None:
    together = draw(7, np.arange(10, 20), (2, 3, 3), 0.5)
    alone = draw(7, np.array([13]), (2, 3, 3), 0.5)
    for all_values, value in zip(together[:-1], alone[:-1], strict=True):  # without a class token
        assert torch.equal(all_values[3:4], value)
    other = draw(8, np.array([13]), (2, 3, 3), 0.5)
    assert not torch.equal(other.noise, alone.noise)


def test_draws_have_the_right_distributions() -> None:
    draws = draw(0, np.arange(4000), (2, 4, 4), 0.1)
    assert draws.t.min() >= 0
    assert draws.t.max() < 1
    assert draws.t.mean() == pytest.approx(0.5, abs=0.02)
    assert draws.drop_label.float().mean() == pytest.approx(0.1, abs=0.02)
    for normal in (draws.noise, draws.posterior):
        assert normal.mean() == pytest.approx(0, abs=0.01)
        assert normal.std() == pytest.approx(1, abs=0.01)
    correlation = (draws.noise * draws.posterior).mean()
    assert correlation == pytest.approx(0, abs=0.01)


def test_ema_follows_its_recurrence() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, 0.9)
    expected = module.weight.detach().clone()
    for _ in range(4):
        nn.init.normal_(module.weight)
        ema.update(module)
        expected = 0.9 * expected + 0.1 * module.weight.detach()
    torch.testing.assert_close(ema.module.weight, expected)


def test_ema_catches_up_in_closed_form() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, 0.9)
    nn.init.normal_(module.weight)
    leaped = catch_up(ema.module.state_dict(), module.state_dict(), 0.9, 5)
    for _ in range(5):
        ema.update(module)
    torch.testing.assert_close(leaped["weight"], ema.module.state_dict()["weight"])


def test_students_see_latents_normalised_by_the_manifest(
    run_config: Callable[..., RunConfig], random_store: Store
) -> None:
    """A sample of the posterior, whose spread has no mean of its own, by each channel's numbers."""
    manifest = random_store.manifest
    mean, std = np.array([-1.5, 2.0, -1.25, 2.5]), np.array([8.5, 6.0, 6.5, 5.25])
    statistics = {"latents_mean": tuple(mean.tolist()), "latents_std": tuple(std.tolist())}
    vae = manifest.autoencoder.model_copy(update=statistics)
    store = Store(random_store.url, manifest.model_copy(update={"autoencoder": vae}))
    trainer = Trainer(run_config(), store, ProcessGroup())
    order = SampleOrder(0, random_store.index().samples_per_shard)
    (batch,) = GradientProbe(trainer, store, order)._batches(22)
    draws = trainer.inputs.draws(batch.positions)
    found = trainer.inputs(batch, draws, time=0.0).noisy  # without noise
    stored = batch.columns["latents"]
    z = stored["mean"].astype(float) + stored["std"].astype(float) * draws.posterior.numpy()
    expected = (z - mean[:, None, None]) * vae.scaling_factor / std[:, None, None]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    trainer.close()
