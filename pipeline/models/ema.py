"""Exponential moving averages of weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from pipeline.distributed.sharding import local

M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """Average of a module's parameters: e <- decay e + (1 - decay) w after every step."""

    def __init__(self, module: M, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, skipped: Tensor | None = None) -> None:
        """One step. ``skipped``, a bool on the device: if the average stays as it is."""
        averages: list[Tensor] = [local(p.data) for p in self.module.parameters()]
        weights: list[Tensor] = [local(p.data) for p in module.parameters()]
        if skipped is not None:
            weights = [torch.where(skipped, e, w) for e, w in zip(averages, weights, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)


def catch_up(
    averages: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float, steps: int
) -> dict[str, Tensor]:
    """Averages after ``steps`` more updates with constant weights.

    e_n = w + decay^n (e_0 - w), the result of the authors' code, which updates every step.
    """
    share = decay**steps
    return {
        name: weights[name] + share * (average - weights[name]) if steps else average
        for name, average in averages.items()
    }
