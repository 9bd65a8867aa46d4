"""When the alignment ends: triggers that look at a run and decide, once.

The loop asks ``wants(step)`` at every step boundary; where it says yes, every rank calls
``observe`` together. Triggers see only numbers that are sums over all ranks, so that all decide
alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from schemas.alignment import (
    AlignmentConfig,
    FixedStep,
    GradientCosine,
    ResidualPlateau,
    TerminationConfig,
)

Sum = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, in place."""
Gather = Callable[[Tensor], list[list[float]]]
"""The numbers of a vector as each rank has them."""
ShareOf = Callable[[list[list[float]]], list[float]]
"""What this rank takes up of such numbers: its own again or, where the ranks are not as many as
they were, a share of their sum."""


class Decision(NamedTuple):
    """What a trigger makes of one look at the run."""

    terminate: bool
    observation: dict[str, Any]
    """What it saw: goes to the metrics file and, if it terminates, into the checkpoint."""


class StepLosses(NamedTuple):
    """One step's losses, means over the global batch, 0-d tensors: this rank's share of the sum."""

    feature: Tensor
    attention: Tensor
    teacher_entropy: Tensor
    """Of the targets' attention rows, in nats."""


class Probe(Protocol):
    """Measurements that a trigger can ask for; every rank calls them together."""

    def gradient_cosines(self, times: Sequence[float], samples: int) -> list[float]:
        """Cosine between the gradients of the alignment and of the denoising loss at each time."""


class Trigger(Protocol):
    """Decides about the termination."""

    needs_entropy: bool
    """Whether ``record`` reads the teacher's entropy, which costs a pass over the targets."""

    def known_step(self) -> int | None:
        """The termination step, where it is certain beforehand."""

    def record(self, losses: StepLosses) -> None:
        """Take in one step. Must not wait for the device."""

    def wants(self, step: int) -> bool:
        """Whether to look at the boundary before ``step``."""

    def observe(self, step: int, probe: Probe, sum_over_ranks: Sum) -> Decision:
        """Look, and decide."""

    def state_dict(self, gather: Gather) -> dict[str, Any]:
        """Plain numbers with which a resumed run decides the same; every rank calls it."""

    def load_state_dict(self, state: Mapping[str, Any], scatter_saved: ShareOf) -> None:
        """Take up a saved state, on as many ranks or on others."""


class _Stateless:
    """A trigger whose decision needs no memory."""

    needs_entropy = False

    def known_step(self) -> int | None:
        return None

    def record(self, losses: StepLosses) -> None:
        """Nothing to remember."""

    def state_dict(self, gather: Gather) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any], scatter_saved: ShareOf) -> None:
        """Nothing to take up."""


class NeverTrigger(_Stateless):
    """Alignment to the end, as in REPA."""

    def wants(self, step: int) -> bool:
        return False

    def observe(self, step: int, probe: Probe, sum_over_ranks: Sum) -> Decision:
        return Decision(False, {})


class FixedStepTrigger(_Stateless):
    """Terminates before a given step (HASTE section 2.4)."""

    def __init__(self, config: FixedStep) -> None:
        self.config = config

    def known_step(self) -> int | None:
        return None if self.config.dry else self.config.step

    def wants(self, step: int) -> bool:
        # in dry mode the step passes and the alignment goes on: look once
        return step == self.config.step if self.config.dry else step >= self.config.step

    def observe(self, step: int, probe: Probe, sum_over_ranks: Sum) -> Decision:
        return Decision(True, {"trigger": "fixed"})


class GradientCosineTrigger(_Stateless):
    """Terminates when the mean cosine between the two gradients is below a threshold (HASTE
    appendix A.2)."""

    def __init__(self, config: GradientCosine) -> None:
        self.config = config

    def wants(self, step: int) -> bool:
        return _is_due(step, self.config.start, self.config.every)

    def observe(self, step: int, probe: Probe, sum_over_ranks: Sum) -> Decision:
        cosines = probe.gradient_cosines(self.config.times, self.config.samples)
        mean = sum(cosines) / len(cosines)
        observation: dict[str, Any] = {"trigger": "gradient_cosine", "gradient_cosine": mean}
        for time, cosine in zip(self.config.times, cosines, strict=True):
            observation[f"gradient_cosine_t{time:g}"] = cosine
        return Decision(mean < self.config.threshold, observation)


class ResidualPlateauTrigger:
    """Terminates when a fast and a slow moving average of the alignment residual agree.

    residual = feature weight (1 + feature loss) + attention weight (cross-entropy - teacher
    entropy), which goes to 0 at a perfect fit. Averages are linear, so each rank averages its own
    share of the residual and only a look sums over ranks.
    """

    needs_entropy = True

    def __init__(self, config: ResidualPlateau, alignment: AlignmentConfig) -> None:
        self.config = config
        self.weights = (alignment.feature_weight, alignment.attention_weight)
        self.steps = 0
        self._constant = float(alignment.feature_weight)  # of "1 + feature loss": not a rank's
        self._decays = torch.tensor([config.fast, config.slow], dtype=torch.float64)
        self._averages: Tensor | None = None  # fast and slow, of this rank's share

    def known_step(self) -> int | None:
        return None

    def record(self, losses: StepLosses) -> None:
        feature_weight, attention_weight = self.weights
        residual = feature_weight * losses.feature + attention_weight * (
            losses.attention - losses.teacher_entropy
        )
        value = residual.detach().double()
        if self._averages is None:
            self._averages = torch.zeros(2, dtype=torch.float64)
        # to where the losses are, once: a copy to a GPU would wait for all that it still has to do
        self._averages, self._decays = (x.to(value.device) for x in (self._averages, self._decays))
        self._averages = self._decays * self._averages + (1 - self._decays) * value
        self.steps += 1

    def wants(self, step: int) -> bool:
        return self.steps > 0 and _is_due(step, self.config.start, self.config.every)

    def observe(self, step: int, probe: Probe, sum_over_ranks: Sum) -> Decision:
        fast, slow = self._corrected(sum_over_ranks)
        agree = abs(fast - slow) <= self.config.tolerance * abs(slow)
        return Decision(
            agree,
            {"trigger": "residual_plateau", "residual_fast": fast, "residual_slow": slow},
        )

    def state_dict(self, gather: Gather) -> dict[str, Any]:
        averages = self._averages
        if averages is None:
            averages = torch.zeros(2, dtype=torch.float64)
        return {"steps": self.steps, "averages": gather(averages)}

    def load_state_dict(self, state: Mapping[str, Any], scatter_saved: ShareOf) -> None:
        self._averages = torch.tensor(scatter_saved(state["averages"]), dtype=torch.float64)
        self.steps = int(state["steps"])

    def _corrected(self, sum_over_ranks: Sum) -> tuple[float, float]:
        """Both averages over all ranks, without the bias of their start at 0."""
        assert self._averages is not None
        totals = sum_over_ranks(self._averages.clone()).tolist()
        decays = (self.config.fast, self.config.slow)
        fast, slow = (
            total / (1 - decay**self.steps) + self._constant
            for total, decay in zip(totals, decays, strict=True)
        )
        return fast, slow


def make_trigger(config: TerminationConfig | None, alignment: AlignmentConfig) -> Trigger:
    """The trigger that a config names; None never terminates."""
    if config is None:
        return NeverTrigger()
    if isinstance(config, FixedStep):
        return FixedStepTrigger(config)
    if isinstance(config, GradientCosine):
        return GradientCosineTrigger(config)
    return ResidualPlateauTrigger(config, alignment)


def _is_due(step: int, start: int, every: int) -> bool:
    return step >= start and (step - start) % every == 0
