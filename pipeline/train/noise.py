"""The random numbers of a training sample, by its position in the run, drawn ahead by a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.randomness import Purpose, generator

Times = Callable[[Tensor], Tensor]
"""Timesteps (B,) in [0, 1) from uniform numbers (B,) in [0, 1)."""


class NoisePrefetcher:
    """Draws the noise of the next step in a thread while the present step computes.

    Draws are a function of the seed and the positions only, so that drawing early changes nothing.
    """

    def __init__(
        self,
        seed: int,
        latent_shape: tuple[int, ...],
        label_drop: float,
        device: torch.device,
        times: Times | None = None,
        *,
        class_token: int | None = None,
    ) -> None:
        """``times`` and ``class_token``: see ``draw``."""
        self._arguments = (seed, latent_shape, label_drop, times)
        self._class_token = class_token
        self._pinned = device.type == "cuda"
        self._expected: tuple[np.ndarray, Future[SampleNoise]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draws")

    def __call__(self, positions: np.ndarray) -> SampleNoise:
        """The draws of the samples at ``positions``, from the thread if ``expect`` named these
        positions, else drawn now."""
        if self._expected is not None:
            expected, draws = self._expected
            if np.array_equal(expected, positions):
                self._expected = None
                return draws.result()
        return self._draw(positions)

    def expect(self, positions: np.ndarray) -> None:
        """Start to draw for the positions that the next step will ask for."""
        if self._expected is not None:
            self._expected[1].cancel()
        self._expected = positions, self._thread.submit(self._draw, positions)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _draw(self, positions: np.ndarray) -> SampleNoise:
        seed, shape, label_drop, times = self._arguments
        token = self._class_token
        draws = draw(seed, positions, shape, label_drop, times, class_token=token)
        if self._pinned:
            return draws.each(lambda values: values.contiguous().pin_memory())
        return draws


class SampleNoise(NamedTuple):
    """Random numbers of B samples."""

    t: Tensor
    """(B,) timesteps in [0, 1)."""
    drop_label: Tensor
    """(B,) bool: train this sample without its class."""
    posterior: Tensor
    """(B, C, h, w) standard normal, for the latent's posterior."""
    noise: Tensor
    """(B, C, h, w) standard normal, the diffusion noise."""
    class_noise: Tensor | None = None
    """(B, E) standard normal, the diffusion noise of the class token; None without one."""

    def each(self, change: Callable[[Tensor], Tensor]) -> SampleNoise:
        """The numbers with ``change`` applied to each tensor."""
        token = self.class_noise
        return SampleNoise(
            t=change(self.t),
            drop_label=change(self.drop_label),
            posterior=change(self.posterior),
            noise=change(self.noise),
            class_noise=None if token is None else change(token),
        )


def draw(
    seed: int,
    positions: np.ndarray,
    latent_shape: tuple[int, ...],
    label_drop: float,
    times: Times | None = None,
    *,
    class_token: int | None = None,
    purpose: Purpose = Purpose.TRAINING,
) -> SampleNoise:
    """All draws of the samples at ``positions``, on the CPU, in float32.

    The order of draws within a sample is fixed: timestep, label drop, posterior, noise, and the
    noise of a class token of width ``class_token``. ``times`` maps the uniform numbers drawn for
    the timesteps to another distribution.
    """
    count = len(positions)
    uniform = np.empty((count, 2), np.float32)
    normal = np.empty((count, 2, *latent_shape), np.float32)
    tokens = np.empty((count, class_token or 0), np.float32)
    for i, position in enumerate(positions):
        rng = generator(purpose, seed, int(position))
        rng.random(out=uniform[i], dtype=np.float32)
        rng.standard_normal(out=normal[i], dtype=np.float32)
        if class_token is not None:
            rng.standard_normal(out=tokens[i], dtype=np.float32)
    uniforms, normals = torch.from_numpy(uniform), torch.from_numpy(normal)
    return SampleNoise(
        uniforms[:, 0] if times is None else times(uniforms[:, 0]),
        uniforms[:, 1] < label_drop,
        normals[:, 0],
        normals[:, 1],
        None if class_token is None else torch.from_numpy(tokens),
    )
