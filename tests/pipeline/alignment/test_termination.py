"""Each trigger fires at the expected step, and decides the same after a resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pipeline.alignment.termination import ResidualPlateauTrigger, StepLosses, Trigger, make_trigger
from schemas.alignment import AlignmentConfig, ResidualPlateau


class ScriptedProbe:
    """Answers with cosines that were written down beforehand."""

    def __init__(self, answers: dict[int, list[float]]) -> None:
        self.answers = answers
        self.step = 0

    def gradient_cosines(self, times: Sequence[float], samples: int) -> list[float]:
        assert len(times) == len(self.answers[self.step])
        return self.answers[self.step]


def trigger_of(**termination: object) -> Trigger:
    config = AlignmentConfig.model_validate({"termination": termination})
    return make_trigger(config.termination, config)


def alone(values: Tensor) -> Tensor:
    return values


def losses_of(residual: float, entropy: float = 3.0) -> StepLosses:
    """Losses with a given alignment residual at weights 0.5."""
    return StepLosses(
        feature=torch.tensor(residual - 1),
        attention=torch.tensor(residual + entropy),
        teacher_entropy=torch.tensor(entropy),
    )


def first_firing(
    trigger: Trigger, steps: range, residual: Callable[[int], float] = lambda step: 1.0
) -> int | None:
    for step in steps:
        if trigger.wants(step) and trigger.observe(step, ScriptedProbe({}), alone).terminate:
            return step
        trigger.record(losses_of(residual(step)))
    return None


def test_no_termination_never_fires() -> None:
    trigger = make_trigger(None, AlignmentConfig())
    assert first_firing(trigger, range(100)) is None


def test_fixed_step_fires_at_its_step_and_after_a_resume_beyond_it() -> None:
    assert first_firing(trigger_of(kind="fixed", step=7), range(20)) == 7
    assert trigger_of(kind="fixed", step=7).known_step() == 7
    assert trigger_of(kind="fixed", step=7).wants(9)
    dry = trigger_of(kind="fixed", step=7, dry=True)
    assert dry.known_step() is None  # or the reader would stop at it
    assert [step for step in range(20) if dry.wants(step)] == [7]


def test_gradient_cosine_looks_when_due_and_fires_below_its_threshold() -> None:
    """The numbers of HASTE's table 9: SiT-B/2 stops at 80k."""
    table = {
        50_000: [-0.0174, 0.0126, 0.0134, 0.0034],
        60_000: [0.0418, -0.0767, 0.0106, 0.0406],
        70_000: [0.0872, -0.0148, -0.0848, 0.1025],
        80_000: [-0.0032, -0.1155, -0.1272, -0.0212],
    }
    trigger = trigger_of(kind="gradient_cosine")
    assert not trigger.wants(49_999)
    assert not trigger.wants(55_000)
    probe, decisions = ScriptedProbe(table), {}
    for step in table:
        assert trigger.wants(step)
        probe.step = step
        decisions[step] = trigger.observe(step, probe, alone)
    assert [step for step, decision in decisions.items() if decision.terminate] == [80_000]
    assert decisions[80_000].observation["gradient_cosine"] == pytest.approx(-0.0668, abs=1e-4)
    assert decisions[80_000].observation["gradient_cosine_t0.1"] == -0.1155


PLATEAU = {"kind": "residual_plateau", "start": 50, "every": 5, "fast": 0.9, "slow": 0.99}


def falling(step: int) -> float:
    """Falls by a hundredth a step until step 60, then stays."""
    return max(0.2, 0.8 - 0.01 * step)


def expected_plateau(residual: Callable[[int], float], start: int) -> int:
    """The same by the definition: bias-corrected averages over all past steps."""
    for step in range(start, 2000, 5):
        means = []
        for decay in (0.9, 0.99):
            weights = [(1 - decay) * decay ** (step - 1 - s) for s in range(step)]
            values = [residual(s) for s in range(step)]
            total = sum(w * v for w, v in zip(weights, values, strict=True))
            means.append(total / (1 - decay**step))
        if abs(means[0] - means[1]) <= 0.02 * abs(means[1]):
            return step
    raise AssertionError("never")


@pytest.mark.parametrize("start", [50, 400])
def test_residual_plateau_fires_when_its_averages_agree(start: int) -> None:
    trigger = trigger_of(**{**PLATEAU, "start": start})
    assert first_firing(trigger, range(2000), falling) == expected_plateau(falling, start)


def test_residual_is_zero_at_a_perfect_fit() -> None:
    trigger = trigger_of(**PLATEAU)
    trigger.record(losses_of(0.0))
    observation = trigger.observe(50, ScriptedProbe({}), alone).observation
    assert observation["residual_fast"] == pytest.approx(0, abs=1e-6)


def test_a_resumed_plateau_decides_the_same() -> None:
    undisturbed = first_firing(trigger_of(**PLATEAU), range(2000), falling)
    trigger = trigger_of(**PLATEAU)
    assert first_firing(trigger, range(73), falling) is None
    state = trigger.state_dict(lambda values: [values.tolist()])
    resumed = trigger_of(**PLATEAU)
    resumed.load_state_dict(state, lambda rows: rows[0])
    assert first_firing(resumed, range(73, 2000), falling) == undisturbed


def test_ranks_average_their_shares_and_agree() -> None:
    """Two ranks with unequal shares see together what one sees alone."""
    config = AlignmentConfig.model_validate({"termination": PLATEAU})
    ranks = [make_trigger(config.termination, config) for _ in range(2)]
    single = make_trigger(config.termination, config)
    for step in range(80):
        whole = losses_of(falling(step))
        single.record(whole)
        for share, rank in zip((0.3, 0.7), ranks, strict=True):
            rank.record(StepLosses(*(share * value for value in whole)))

    def sum_over_ranks(values: Tensor) -> Tensor:
        both = [r._averages for r in ranks if isinstance(r, ResidualPlateauTrigger)]
        return sum(b for b in both if b is not None) + 0 * values

    expected = single.observe(80, ScriptedProbe({}), alone)
    for rank in ranks:
        got = rank.observe(80, ScriptedProbe({}), sum_over_ranks)
        assert got.terminate == expected.terminate
        assert got.observation["residual_slow"] == pytest.approx(
            expected.observation["residual_slow"]
        )
    rows = [rank._averages.tolist() for rank in ranks if isinstance(rank, ResidualPlateauTrigger)]
    state = ranks[0].state_dict(lambda _: rows)
    again = [make_trigger(config.termination, config) for _ in range(2)]
    for number, rank in enumerate(again):
        rank.load_state_dict(state, lambda rows, number=number: rows[number])
        assert rank.state_dict(lambda values: [values.tolist()])["averages"] == [rows[number]]


def test_plateau_of_the_validation_loss() -> None:
    """Averages of a step function: each measurement stands for the steps since the one before."""
    config = ResidualPlateau(
        kind="residual_plateau",
        residual="validation_loss",
        start=0,
        every=1,
        fast=0.9,
        slow=0.99,
        tolerance=0.05,
    )
    trigger = make_trigger(config, AlignmentConfig())
    measured = {10: 2.0, 25: 1.0, 40: 0.9, 60: 0.9, 200: 0.95}
    averages = {"fast": 0.0, "slow": 0.0}
    decisions, last = [], 0
    for step, loss in measured.items():
        trigger.record_validation(step, loss)
        for _ in range(last, step):
            for name, decay in (("fast", 0.9), ("slow", 0.99)):
                averages[name] = decay * averages[name] + (1 - decay) * loss
        last = step
        restored = make_trigger(config, AlignmentConfig())
        restored.load_state_dict(trigger.state_dict(no_gather), no_scatter)
        assert restored.wants(step) == trigger.wants(step) == (step >= 40)
        if not trigger.wants(step):
            continue
        decision = restored.observe(step, None, None)  # type: ignore[arg-type]
        assert decision == trigger.observe(step, None, None)  # type: ignore[arg-type]
        expected = [averages[n] / (1 - d**step) for n, d in (("fast", 0.9), ("slow", 0.99))]
        found = [decision.observation[f"validation_{name}"] for name in ("fast", "slow")]
        assert found == pytest.approx(expected)
        decisions.append(decision.terminate)
    assert decisions == [False, False, True]  # 0.95 is a rise, which ends it too


def no_gather(values: object) -> list[list[float]]:
    raise AssertionError("the state is equal on all ranks")


def no_scatter(rows: object) -> list[float]:
    raise AssertionError("the state is equal on all ranks")
