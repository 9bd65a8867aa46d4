"""Triggers that decide, once per run, when the alignment ends.

The training loop calls ``wants(step)`` at every step boundary; if it is true, all ranks call
``observe`` together. Decisions depend only on sums over all ranks, so all ranks decide the same.

A trigger with ``dry: true`` decides as usual, but the loop only logs its decision and the
alignment goes on. Here ``dry`` changes one trigger: ``FixedStepTrigger`` has no known step and is
due at its step only, not at every later one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from schemas.alignment import (
    AlignmentConfig,
    FixedStep,
    GradientCosine,
    Ramp,
    ResidualPlateau,
    TerminationConfig,
)

Sum = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, in place."""
Gather = Callable[[Tensor], list[list[float]]]
"""Collects a vector from all ranks: one list of numbers per rank."""
ScatterSaved = Callable[[list[list[float]]], list[float]]
"""This rank's part of gathered numbers: its own, or a share of their sum if the number of ranks
has changed."""


MIN_VALIDATIONS = 3
"""Measurements of the validation loss before two averages of it are compared."""


class Decision(NamedTuple):
    """Result of one observation."""

    terminate: bool
    observation: dict[str, Any]
    """Evidence: written to the metrics file and, on termination, into the checkpoint."""

    @property
    def not_finite(self) -> list[str]:
        """Names of observed numbers that are not finite: they decide nothing."""
        return [
            name
            for name, value in self.observation.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]


class StepLosses(NamedTuple):
    """This rank's part of one step's losses, 0-d tensors. Their sums over ranks are means over the
    global batch."""

    feature: Tensor
    attention: Tensor
    teacher_entropy: Tensor
    """Mean entropy of the teacher's attention rows, in nats."""


class Probe(Protocol):
    """Measurements for a trigger; all ranks call them together."""

    def gradient_cosines(self, times: Sequence[float], samples: int) -> list[float]:
        """Cosine between the gradients of the alignment and of the denoising loss at each time."""


class Trigger(Protocol):
    """Decides when the alignment terminates."""

    needs_entropy: bool
    """True if ``record`` reads the teacher's entropy, which costs a pass over the targets."""

    def known_step(self) -> int | None:
        """The termination step if it is known in advance, else None."""

    def factor(self, step: int) -> float:
        """Factor of the alignment's weights at ``step``, 0 to 1."""

    def record(self, losses: StepLosses, skipped: Tensor | None = None) -> None:
        """Record the losses of one step. Must not synchronise with the device. ``skipped``, bool
        and equal on all ranks: if the step counts for nothing."""

    def record_validation(self, step: int, loss: float) -> None:
        """Record the validation loss after ``step`` steps, equal on all ranks."""

    def wants(self, step: int) -> bool:
        """True if ``observe`` is due at the boundary before ``step``."""

    def observe(self, step: int, probe: Probe, sum_over_ranks: Sum) -> Decision:
        """Measure and decide; all ranks call it together."""

    def state_dict(self, gather: Gather) -> dict[str, Any]:
        """State as plain numbers, for the same decisions after a resume; all ranks call it."""

    def load_state_dict(self, state: Mapping[str, Any], scatter_saved: ScatterSaved) -> None:
        """Restore a saved state, on the same or another number of ranks."""


class _Stateless:
    """Trigger without state."""

    needs_entropy = False

    def known_step(self) -> int | None:
        return None

    def factor(self, step: int) -> float:
        return 1.0

    def record(self, losses: StepLosses, skipped: Tensor | None = None) -> None:
        """No state to update."""

    def record_validation(self, step: int, loss: float) -> None:
        """No state to update."""

    def state_dict(self, gather: Gather) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any], scatter_saved: ScatterSaved) -> None:
        """No state to restore."""


class NeverTrigger(_Stateless):
    """Never terminates, as in REPA."""

    def wants(self, step: int) -> bool:
        return False

    def observe(self, step: int, probe: Probe, sum_over_ranks: Sum) -> Decision:
        return Decision(False, {})


class FixedStepTrigger(_Stateless):
    """Terminates at the boundary before a given step (HASTE section 2.4)."""

    def __init__(self, config: FixedStep) -> None:
        self.config = config

    def known_step(self) -> int | None:
        return None if self.config.dry else self.config.step

    def factor(self, step: int) -> float:
        ramp = None if self.config.dry else self.config.ramp
        return ramp_factor(ramp, self.config.step - step)

    def wants(self, step: int) -> bool:
        if self.config.dry:  # the alignment continues after the step, and one event is logged
            return step == self.config.step
        return step >= self.config.step

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
        terminate = all(map(math.isfinite, cosines)) and mean < self.config.threshold
        return Decision(terminate, observation)


class ResidualPlateauTrigger:
    """Terminates when a fast and a slow moving average of the alignment residual agree.

    residual = feature weight (1 + feature loss) + attention weight (cross-entropy - teacher
    entropy), which is 0 at a perfect fit. Averages are linear, so each rank averages its part of
    the residual and only ``observe`` sums over ranks.
    """

    needs_entropy = True

    def __init__(self, config: ResidualPlateau, alignment: AlignmentConfig) -> None:
        self.config = config
        self.weights = (alignment.feature_weights, alignment.attention_weights)
        self.steps = 0
        self._constant = float(self.weights[0])  # the 1 of "1 + feature loss", after the sum
        self._averages: Tensor | None = None  # fast and slow, of this rank's part
        self._skipped: Tensor | int = 0

    def known_step(self) -> int | None:
        return None

    def factor(self, step: int) -> float:
        return 1.0

    def record(self, losses: StepLosses, skipped: Tensor | None = None) -> None:
        feature_weight, attention_weight = self.weights
        residual = feature_weight * losses.feature + attention_weight * (
            losses.attention - losses.teacher_entropy
        )
        value = residual.detach().double()
        if self._averages is None:
            self._averages = torch.zeros(2, dtype=torch.float64, device=value.device)
        before = self._averages.to(value.device)  # a copy in the first step of a resumed run only
        # decays are Python numbers, because a copy to a GPU waits for its queued work
        decays = (self.config.fast, self.config.slow)
        averages = torch.stack(
            [d * average + (1 - d) * value for d, average in zip(decays, before, strict=True)]
        )
        if skipped is not None:
            averages = torch.where(skipped, before, averages)
            self._skipped = self._skipped + skipped
        self._averages = averages
        self.steps += 1

    def record_validation(self, step: int, loss: float) -> None:
        """Validation losses are not the residual."""

    def wants(self, step: int) -> bool:
        return self.steps > 0 and _is_due(step, self.config.start, self.config.every)

    def observe(self, step: int, probe: Probe, sum_over_ranks: Sum) -> Decision:
        fast, slow = self._corrected(sum_over_ranks)
        finite = math.isfinite(fast) and math.isfinite(slow)
        agree = finite and abs(fast - slow) <= self.config.tolerance * abs(slow)
        return Decision(
            agree,
            {"trigger": "residual_plateau", "residual_fast": fast, "residual_slow": slow},
        )

    def state_dict(self, gather: Gather) -> dict[str, Any]:
        averages = self._averages
        if averages is None:
            averages = torch.zeros(2, dtype=torch.float64)
        return {"steps": self._counted_steps(), "averages": gather(averages)}

    def load_state_dict(self, state: Mapping[str, Any], scatter_saved: ScatterSaved) -> None:
        self._averages = torch.tensor(scatter_saved(state["averages"]), dtype=torch.float64)
        self.steps, self._skipped = int(state["steps"]), 0

    def _counted_steps(self) -> int:
        """Recorded steps without skipped ones; waits for the device if steps may be skipped."""
        return self.steps - int(self._skipped)

    def _corrected(self, sum_over_ranks: Sum) -> tuple[float, float]:
        """Bias-corrected fast and slow average over all ranks."""
        assert self._averages is not None
        totals = sum_over_ranks(self._averages.clone()).tolist()
        decays = (self.config.fast, self.config.slow)
        steps = self._counted_steps()
        if not steps:
            return math.nan, math.nan
        fast, slow = (
            total / (1 - decay**steps) + self._constant
            for total, decay in zip(totals, decays, strict=True)
        )
        return fast, slow


class ValidationPlateauTrigger(_Stateless):
    """Terminates when a fast moving average of the validation loss is no longer below a slow one.

    Each measurement stands for the steps since the one before, so that the decays are those of
    steps, as in ``ResidualPlateauTrigger``.
    """

    def __init__(self, config: ResidualPlateau) -> None:
        self.config = config
        self._step = self._count = 0  # of the last measurement; measurements
        self._averages = (0.0, 0.0)

    def record_validation(self, step: int, loss: float) -> None:
        shares = (decay ** (step - self._step) for decay in (self.config.fast, self.config.slow))
        fast, slow = (
            share * average + (1 - share) * loss
            for share, average in zip(shares, self._averages, strict=True)
        )
        self._averages = fast, slow
        self._step, self._count = step, self._count + 1

    def wants(self, step: int) -> bool:
        enough = self._count >= MIN_VALIDATIONS
        return enough and _is_due(step, self.config.start, self.config.every)

    def observe(self, step: int, probe: Probe, sum_over_ranks: Sum) -> Decision:
        fast, slow = (  # corrected for the average's beginning at 0
            average / (1 - decay**self._step)
            for decay, average in zip(
                (self.config.fast, self.config.slow), self._averages, strict=True
            )
        )
        finite = math.isfinite(fast) and math.isfinite(slow)
        return Decision(
            finite and slow - fast <= self.config.tolerance * abs(slow),
            {"trigger": "residual_plateau", "validation_fast": fast, "validation_slow": slow},
        )

    def state_dict(self, gather: Gather) -> dict[str, Any]:
        fast, slow = self._averages
        return {"step": self._step, "count": self._count, "fast": fast, "slow": slow}

    def load_state_dict(self, state: Mapping[str, Any], scatter_saved: ScatterSaved) -> None:
        self._step, self._count = int(state["step"]), int(state["count"])
        self._averages = float(state["fast"]), float(state["slow"])


class RampedTrigger:
    """Another trigger, with a ramp between the step at which it fires and the termination."""

    def __init__(self, trigger: Trigger, ramp: Ramp) -> None:
        self.trigger = trigger
        self.ramp = ramp
        self.needs_entropy = trigger.needs_entropy
        self._end: int | None = None  # the termination step, once the trigger has fired
        self._evidence: dict[str, Any] = {}

    def known_step(self) -> int | None:
        return self._end

    def factor(self, step: int) -> float:
        return 1.0 if self._end is None else ramp_factor(self.ramp, self._end - step)

    def record(self, losses: StepLosses, skipped: Tensor | None = None) -> None:
        if self._end is None:
            self.trigger.record(losses, skipped)

    def record_validation(self, step: int, loss: float) -> None:
        if self._end is None:
            self.trigger.record_validation(step, loss)

    def wants(self, step: int) -> bool:
        return self.trigger.wants(step) if self._end is None else step >= self._end

    def observe(self, step: int, probe: Probe, sum_over_ranks: Sum) -> Decision:
        if self._end is not None:
            return Decision(True, self._evidence)
        decision = self.trigger.observe(step, probe, sum_over_ranks)
        if not decision.terminate:
            return decision
        self._end = step + self.ramp.steps
        self._evidence = {**decision.observation, "ramp_began_at_step": step}
        return Decision(False, self._evidence)

    def state_dict(self, gather: Gather) -> dict[str, Any]:
        state = self.trigger.state_dict(gather)
        if self._end is None:
            return state
        return {**state, "ramp": {"end": self._end, "evidence": self._evidence}}

    def load_state_dict(self, state: Mapping[str, Any], scatter_saved: ScatterSaved) -> None:
        self.trigger.load_state_dict(state, scatter_saved)
        if "ramp" in state:
            self._end = int(state["ramp"]["end"])
            self._evidence = dict(state["ramp"]["evidence"])


def make_trigger(config: TerminationConfig | None, alignment: AlignmentConfig) -> Trigger:
    """The configured trigger; without a config the alignment never terminates."""
    trigger: Trigger
    if config is None:
        return NeverTrigger()
    if isinstance(config, FixedStep):
        return FixedStepTrigger(config)
    if isinstance(config, GradientCosine):
        trigger = GradientCosineTrigger(config)
    elif config.residual == "validation_loss":
        trigger = ValidationPlateauTrigger(config)
    else:
        trigger = ResidualPlateauTrigger(config, alignment)
    # a dry trigger changes nothing, and so does its ramp
    return trigger if config.ramp is None or config.dry else RampedTrigger(trigger, config.ramp)


def ramp_factor(ramp: Ramp | None, steps: int) -> float:
    """Factor at ``steps`` from the end of a ramp at which it is 0: 1 from its other end on, or
    without a ramp."""
    if ramp is None or steps >= ramp.steps:
        return 1.0
    share = max(steps, 0) / ramp.steps
    return share if ramp.kind == "linear" else (1 - math.cos(math.pi * share)) / 2


def alignment_factor(alignment: AlignmentConfig, trigger: Trigger, step: int) -> float:
    """Factor of the alignment's weights at ``step``: that of the warm-up, which is 0 before step 0,
    times that of the trigger."""
    return ramp_factor(alignment.warmup, step + 1) * trigger.factor(step)


def _is_due(step: int, start: int, every: int) -> bool:
    return step >= start and (step - start) % every == 0
