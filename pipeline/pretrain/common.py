"""Parts that the training loops of this folder share."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.cli.progress import progress_bar
from pipeline.train.device_transfer import DevicePrefetcher
from schemas.errors import NonFiniteError
from schemas.extract import IMAGENET_MEAN, IMAGENET_STD

logger = logging.getLogger(__name__)

LOG_EVERY = 100  # steps


def shuffled_batches(count: int, size: int) -> Iterator[Tensor]:
    """Batches of indices below ``count`` without end: a new permutation each epoch, its incomplete
    last batch dropped."""
    size = min(size, count)
    while True:
        yield from torch.randperm(count)[: count // size * size].split(size)


def copied_batches(
    tensors: Mapping[str, Tensor], size: int, device: torch.device | str
) -> Iterator[dict[str, Tensor]]:
    """Rows of ``tensors`` (N, ...) in ``shuffled_batches``, on the device. Python waits for none:
    a GPU copies the next batch while it computes the present step."""
    feed = DevicePrefetcher(torch.device(device))
    for batch in shuffled_batches(len(next(iter(tensors.values()))), size):
        yield feed({name: tensor[batch] for name, tensor in tensors.items()})


def autocast(device: torch.device | str) -> torch.autocast:
    """bfloat16 on a GPU; unchanged arithmetic on a CPU."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


class Schedule(Protocol):
    """Fields of the configs of this folder."""

    steps: int
    learning_rate: float
    warmup_steps: int


class Updater:
    """AdamW whose learning rate rises linearly and falls along a half cosine to zero."""

    def __init__(
        self,
        name: str,
        parameters: Any,
        schedule: Schedule,
        *,
        clip: float = math.inf,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        """``name``: of the network, for messages. ``parameters``: groups with their weight decay,
        or tensors without one. ``clip``: largest norm of the gradient."""
        self.optimizer = torch.optim.AdamW(parameters, betas=betas, weight_decay=0.0)
        self.name, self.schedule, self.clip = name, schedule, clip
        self._bar = progress_bar(total=schedule.steps, unit="step", desc=name)

    def update(self, step: int, loss: Tensor) -> None:
        """One step down the gradient of ``loss``; logs every ``LOG_EVERY``-th loss and the last.
        Raises ``NonFiniteError`` where such a loss is not finite."""
        steps = self.schedule.steps
        factor = min(1.0, (step + 1) / self.schedule.warmup_steps)
        factor *= 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip < math.inf:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizer.step()
        self._bar.update()
        if step % LOG_EVERY == 0 or step == steps - 1:
            value = loss.item()
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"the {self.name}'s loss is not finite at step {step} (first at one of the "
                    f"last {LOG_EVERY} steps): give a lower learning rate"
                )
            logger.info("%s: step %5d  loss %.4f", self.name, step, value)
        if step == steps - 1:
            self._bar.close()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases, norms and layer scales without."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def normalise(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, R, R) in [0, 1] to ImageNet's mean and std, as DINOv2 expects them."""
    mean, std = _imagenet_statistics(pixels.device, pixels.dtype)
    return (pixels - mean) / std


@cache
def _imagenet_statistics(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and std, each (3, 1, 1), copied to a device once, because Python waits for the copy."""
    mean, std = (
        torch.tensor(values, dtype=dtype).to(device)[:, None, None]
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return mean, std


def check_weights(model: nn.Module) -> None:
    """Raises ``NonFiniteError`` where trained weights or buffers are not finite."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise NonFiniteError(f"'{name}' is not finite: give a lower learning rate")
