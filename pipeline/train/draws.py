"""The random numbers of a training sample, by its position in the run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.randomness import Purpose, generator


class Draws(NamedTuple):
    """For B samples."""

    t: Tensor
    """(B,) timesteps, uniform on [0, 1)."""
    drop_label: Tensor
    """(B,) bool: train this sample without its class."""
    posterior: Tensor
    """(B, C, h, w) standard normal, for the latent's posterior."""
    noise: Tensor
    """(B, C, h, w) standard normal, the diffusion noise."""


def draw(
    seed: int, positions: np.ndarray, latent_shape: tuple[int, ...], label_drop: float
) -> Draws:
    """All draws of the samples at ``positions``, on the CPU, in float32.

    The order of draws within a sample is fixed: timestep, label drop, posterior, noise.
    """
    count = len(positions)
    uniform = np.empty((count, 2), np.float32)
    normal = np.empty((count, 2, *latent_shape), np.float32)
    for i, position in enumerate(positions):
        rng = generator(Purpose.TRAINING, seed, int(position))
        rng.random(out=uniform[i], dtype=np.float32)
        rng.standard_normal(out=normal[i], dtype=np.float32)
    uniforms, normals = torch.from_numpy(uniform), torch.from_numpy(normal)
    return Draws(uniforms[:, 0], uniforms[:, 1] < label_drop, normals[:, 0], normals[:, 1])
