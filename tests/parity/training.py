"""Recorded training steps taken by our Trainer, and the checks that every recipe's have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.checkpoints.reference_format import NULL_CONTEXT, Parts, join_state, split_state
from pipeline.models.ema import catch_up
from pipeline.store import Batch
from pipeline.train.noise import NoisePrefetcher, SampleNoise
from pipeline.train.trainer import Trainer
from tests.parity.reference import Golden, check_close, check_number

# README.json suggests these. The change of the weights is held to 1e-3, because Adam divides by the
# root of second moments that are near 0 in places; the change of the averages, 1e-4 of that, to
# 3e-2, because float32 rounding of the averages alone moves it by about 1e-2 in small tensors.
TOLERANCE = {"model": 1e-3, "ema": 3e-2}
# Softmax is shift-invariant: keys' biases have gradient 0, and Adam makes steps of rounding noise.
# The authors average the frozen position table too, which moves it by rounding; ours is a buffer.
NOISE = re.compile(r".*\[k third\]|pos_embed")


def optimizer_options(train: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the recorded AdamW."""
    keys = ("betas", "weight_decay", "eps", "max_grad_norm")
    return {"learning_rate": train["lr"], **{key: train[key] for key in keys}}


def load_recorded(trainer: Trainer, state: Mapping[str, Tensor]) -> None:
    """Recorded weights, as those of the student and as averages. The null caption stays: the
    authors keep it in a file of its own."""
    parts = split_state(state)
    for student in (trainer.module.student, trainer.ema.module):
        own = {n: t for n, t in student.state_dict().items() if n == NULL_CONTEXT}
        student.load_state_dict({**own, **parts.student})
    for projector in (trainer.projectors[0], trainer.projector_emas[0].module):
        projector.load_state_dict(parts.projector)


@contextmanager
def recorded_noise(draws: SampleNoise) -> Iterator[None]:
    """The trainer takes these draws instead of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoisePrefetcher, "__call__", lambda *_: draws)
        yield


def take_steps(
    trainer: Trainer,
    records: Sequence[Mapping[str, Any]],
    batch_of: Callable[[int], Batch],
    draws_of: Callable[[int], SampleNoise],
) -> SimpleNamespace:
    """All recorded steps; what each returned, and the weights before the first and after the
    last."""
    initial = {name: t.double().clone() for name, t in state_of(trainer, average=False).items()}
    results = []
    for step, record in enumerate(records):
        if trainer.aligned and not record.get("aligned", True):
            trainer.terminate({"trigger": "fixed"})
        with recorded_noise(draws_of(step)):
            condition = trainer.inputs(batch_of(step)).condition
            *sums, norm = trainer.train_step(batch_of(step)).tolist()
        states = [state_of(trainer, average=average) for average in (False, True)]
        changes = [_norm_of_change(state, initial) for state in states]
        losses = {
            name: value / trainer.config.global_batch
            for name, value in zip(trainer.module.losses, sums, strict=True)
        }
        results.append(
            SimpleNamespace(losses=losses, norm=norm, changes=changes, condition=condition)
        )
    trainer.close()
    model, ema = states
    return SimpleNamespace(
        config=trainer.config,
        records=records,
        results=results,
        initial=initial,
        model=model,
        ema=ema,
    )


def state_of(trainer: Trainer, *, average: bool) -> dict[str, Tensor]:
    """Weights or averages under the reference's names, as a checkpoint of ours holds them, without
    the null caption."""
    if average:
        lag = trainer.step - trainer.termination["terminated_at_step"] if trainer.termination else 0
        ema = trainer.projector_emas[0]
        weights = trainer.projectors[0].state_dict()
        projector = catch_up(ema.module.state_dict(), weights, ema.decay, lag)
        state = join_state(Parts(trainer.ema.module.state_dict(), projector))
    else:
        student = trainer.module.student.state_dict()
        state = join_state(Parts(student, trainer.projectors[0].state_dict()))
    return {name: tensor for name, tensor in state.items() if name != NULL_CONTEXT}


def check_gradient_norms(run: SimpleNamespace) -> None:
    for record, result in zip(run.records, run.results, strict=True):
        what = f"step {record['step']}: gradient norm"
        check_number(what, result.norm, record["grad_norm_before_clip"])


def check_changes(run: SimpleNamespace) -> None:
    """The norm of the change of all weights after every step."""
    for record, result in zip(run.records, run.results, strict=True):
        for kind, change in zip(TOLERANCE, result.changes, strict=True):
            assert change == pytest.approx(record[f"{kind}_delta_l2_all"], rel=TOLERANCE[kind])


def check_final_sums(run: SimpleNamespace, expected: Mapping[str, Any], kind: str) -> None:
    """Sum and norm of every final parameter, and of its change."""
    for name, numbers in expected.items():
        if NOISE.fullmatch(name):
            continue
        final, start = (third(state, name).double() for state in (getattr(run, kind), run.initial))
        # An error of a given norm can move a sum by sqrt(n) times that (Cauchy-Schwarz). The
        # averages' rounding is that one-sided; what strays in Adam strays both ways.
        allowed = _allowed(numbers, kind)
        root = final.numel() ** 0.5
        for_sum = allowed * (root if kind == "ema" else min(root, 10))
        for what, ours, slack in (
            ("minus_init_l2", (final - start).norm(), allowed),
            ("minus_init_sum", (final - start).sum(), for_sum),
            ("l2", final.norm(), allowed),
            ("sum", final.sum(), for_sum),
        ):
            theirs = numbers[f"{kind}_{what}"]
            assert abs(ours.item() - theirs) <= slack, f"{name}: {kind}_{what}"


def check_final_tensors(
    recipes: Golden,
    run: SimpleNamespace,
    file: str,
    sums: Mapping[str, Any],
    infix: str = "",
    *,
    rounding: bool = True,
) -> int:
    """The final parameters that ``file`` holds; their number. ``rounding``: allow for the recorded
    rounding of both, too."""
    io = recipes.tensors(file)
    pattern = rf"final_(model|ema)\.{re.escape(infix)}(.*)"
    names = [name for name in io if re.match(pattern, name)]
    for name in names:
        kind, parameter = re.fullmatch(pattern, name).groups()
        thirds = [p for p in sums if p.split(" [")[0] == parameter and not NOISE.fullmatch(p)]
        for part in thirds:
            ours, theirs = third(getattr(run, kind), part), third({parameter: io[name]}, part)
            # no element strays further than the whole change may, or than both may by rounding
            slack = 2 * (recipes.noise(file, name) or 0.0) if rounding else 0.0
            check_close(name, ours, theirs, _allowed(sums[part], kind) + slack)
    return len(names)


def third(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A parameter, or the third of a qkv bias that ``NAME [k third]`` names."""
    match = re.fullmatch(r"(.*) \[([qkv]) third\]", name)
    return state[name] if match is None else state[match[1]].chunk(3)["qkv".index(match[2])]


def _allowed(numbers: Mapping[str, Any], kind: str) -> float:
    """A share of the whole change, and the rounding of the reference itself where it is recorded:
    that of a large label table is a third of its average's change."""
    change = numbers[f"{kind}_minus_init_l2"]
    exact = numbers.get("float64_rerun", numbers)[f"{kind}_minus_init_l2"]
    return TOLERANCE[kind] * change + 3 * abs(change - exact)


def _norm_of_change(state: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> float:
    squares = [(state[name].double() - start).square().sum() for name, start in initial.items()]
    return torch.stack(squares).sum().sqrt().item()
