"""Exponential moving averages of weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """The average of a module's parameters: e <- decay e + (1 - decay) w after every step."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        averages: list[Tensor] = list(self.module.parameters())
        torch._foreach_mul_(averages, self.decay)
        weights: list[Tensor] = [p.data for p in module.parameters()]
        torch._foreach_add_(averages, weights, alpha=1 - self.decay)

    @torch.no_grad()
    def caught_up(self, module: nn.Module, steps: int) -> dict[str, Tensor]:
        """The average's state after ``steps`` more updates with weights that do not change.

        e_n = w + decay^n (e_0 - w): what the authors' code reaches by updating every step.
        """
        if steps == 0:
            return self.module.state_dict()
        weights, share = module.state_dict(), self.decay**steps
        return {
            name: weights[name] + share * (average - weights[name])
            for name, average in self.module.state_dict().items()
        }
