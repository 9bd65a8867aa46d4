"""The sampler's noise, drawn by threads while the network computes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from pipeline.randomness import NormalDraws, Purpose

AHEAD = 3
"""Draws in memory that the sampler has not asked for; at 256 images of 32 x 32 x 4, 4 MB each."""


class NoiseAhead:
    """Standard normal noise number 0, 1, ... of images, in this order: for each number one tensor
    (B, *shape) for each shape, on ``device``. Each value depends on the seed, the image and the
    number only.

    numpy draws without Python's lock, so that neither Python nor the device waits for it. On a GPU
    the numbers are drawn into pinned memory, because Python would wait for a copy from other memory
    and for all work queued before it.
    """

    def __init__(
        self,
        seed: int,
        images: range,
        shapes: Sequence[tuple[int, ...]],
        device: torch.device,
        *,
        count: int,
    ) -> None:
        """``count`` numbers will be asked for."""
        self._seed, self._images, self._shapes, self._device = seed, images, shapes, device
        self._numbers = iter(range(count))
        threads = min(AHEAD, count, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(threads, "sampling-noise")
        self._pending: deque[Future[list[Tensor]]] = deque()

    def __enter__(self) -> NoiseAhead:
        self._request(AHEAD)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def __call__(self) -> list[Tensor]:
        """The next number."""
        drawn = self._pending.popleft().result()
        self._request(1)
        return [tensor.to(self._device, non_blocking=True) for tensor in drawn]

    def _request(self, count: int) -> None:
        for _, number in zip(range(count), self._numbers, strict=False):
            # allocated here, because threads leave torch alone
            pinned = self._device.type == "cuda"
            host = [
                torch.empty(len(self._images), *shape, pin_memory=pinned) for shape in self._shapes
            ]
            self._pending.append(self._threads.submit(self._fill, host, number))

    def _fill(self, host: list[Tensor], number: int) -> list[Tensor]:
        arrays: list[np.ndarray] = [tensor.numpy() for tensor in host]
        draws = NormalDraws(Purpose.SAMPLING, self._seed)
        for place, image in enumerate(self._images):
            draws.fill([array[place] for array in arrays], image, number)
        return host
