"""Functions that the training loops of this folder share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.teachers.vit import IMAGENET_MEAN, IMAGENET_STD
from schemas.errors import NonFiniteError

LOG_EVERY = 100  # steps


def shuffled_batches(count: int, size: int) -> Iterator[Tensor]:
    """Batches of indices below ``count`` without end: a new permutation each epoch, its incomplete
    last batch dropped."""
    size = min(size, count)
    while True:
        yield from torch.randperm(count)[: count // size * size].split(size)


def warmup_cosine(step: int, warmup_steps: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then a half cosine to zero."""
    warmup = min(1.0, (step + 1) / warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


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
    mean = pixels.new_tensor(IMAGENET_MEAN)[:, None, None]
    return (pixels - mean) / pixels.new_tensor(IMAGENET_STD)[:, None, None]


def check_losses(step: int, **losses: float) -> None:
    """Raises ``NonFiniteError`` where a loss that is logged at ``step`` is not finite: weights that
    became so at a step since the last log make all later losses so."""
    for name, value in losses.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss '{name}' is not finite at step {step} (first at one of the last "
                f"{LOG_EVERY} steps): give a lower learning rate"
            )


def check_weights(model: nn.Module) -> None:
    """Raises ``NonFiniteError`` where trained weights or buffers are not finite."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise NonFiniteError(f"'{name}' is not finite: give a lower learning rate")


def logs_step(step: int, steps: int) -> bool:
    """True for every ``LOG_EVERY``-th step and the last."""
    return step % LOG_EVERY == 0 or step == steps - 1
