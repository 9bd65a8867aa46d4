"""Stored moments to latents: the posterior's sample, scaled, in the authors' two conventions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from pipeline.distributed.process_group import ProcessGroup
from pipeline.store import Batch, Store
from pipeline.train.noise import NoisePrefetcher, SampleNoise
from pipeline.train.trainer import Trainer
from schemas.run import RunConfig
from tests.parity.reference import Golden
from tests.stores import random_manifest

FILE = "vae_moments"


@pytest.fixture
def posterior_noise(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The recorded draw, in place of the trainer's own."""
    eps = golden.tensors(FILE)["eps"]
    zeros = torch.zeros(len(eps))
    draws = SampleNoise(
        t=zeros, drop_label=zeros.bool(), posterior=eps, noise=torch.zeros_like(eps)
    )
    monkeypatch.setattr(NoisePrefetcher, "__call__", lambda *_: draws)
    return eps


def latents(golden: Golden, mean: Tensor, std: Tensor) -> Tensor:
    """What the trainer makes of a store's moments."""
    batch, *shape = mean.shape
    blank = random_manifest(samples=1, shard_size=1)
    scale = golden.configs["train"]["latents_scale"]
    autoencoder = blank.autoencoder.model_copy(
        update={"latent_shape": tuple(shape), "scaling_factor": scale, "shift_factor": 0.0}
    )
    manifest = blank.model_copy(update={"autoencoder": autoencoder})
    config = RunConfig.model_validate(
        {
            "global_batch": batch,
            "student": {
                "model": "SiT-S/1",
                "depth": 1,
                "width": 4,
                "heads": 1,
                "latent_channels": shape[0],
                "latent_size": shape[1],
            },
            "alignment": {"feature_weight": 0, "attention_weight": 0},
        }
    )
    trainer = Trainer(config, Store("memory://parity", manifest), ProcessGroup())
    columns = {
        "mean": mean.numpy(),
        "std": std.numpy(),
        "label": np.zeros(batch, np.int64),
    }
    stored = Batch(step=0, positions=np.arange(batch), columns={"latents": columns})
    # at t = 0 noisy latents are the latents
    return trainer.inputs(stored, time=0.0).noisy


@pytest.mark.usefixtures("posterior_noise")
def test_imagenet_s_mean_and_standard_deviation(golden: Golden) -> None:
    mean, std = golden.tensors(FILE)["imagenet_moments"].chunk(2, dim=1)
    golden.check(FILE, "imagenet_latents", latents(golden, mean, std))


@pytest.mark.usefixtures("posterior_noise")
def test_coco_s_mean_and_log_variance(golden: Golden) -> None:
    # our stores hold standard deviations, which extraction takes from diffusers' posterior
    posterior = DiagonalGaussianDistribution(golden.tensors(FILE)["coco_moments"])
    golden.check(FILE, "coco_latents", latents(golden, posterior.mean, posterior.std))
