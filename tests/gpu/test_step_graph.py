"""Steps of ``compute.cuda_graphs``: replayed by the CPU to the bit, and rehearsed for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.store import Store
from pipeline.train.optimizer import ClippedAdamW
from pipeline.train.step_graph import WARM_UP, StepGraph
from schemas.errors import UserError
from tests.gpu.cpu_graph import cpu_graphs
from tests.gpu.fake_gpu import CUDA, FakeGpu, needs_cuda_build
from tests.gpu.steps import Steps, open_steps, reg, run_config, text

CPU = torch.device("cpu")
PHASE = WARM_UP + 3
GRAPHS = {"compute": {"cuda_graphs": True}}
MICRO = {"workers": {"micro_batch": 3}}
SKIP = {"train": {"on_nan": "skip_step"}}


def both_phases(steps: Steps) -> list[Tensor]:
    """Results and skipped of each step, then weights, averages, moments and counts of steps."""
    found = []
    for phase in range(2):
        for number in range(PHASE):
            # as a ramp changes it: not in the graph
            steps.trainer.factor = 0.5 if phase == 0 and number < 2 else 1.0
            found.append(steps.take(1))
            if steps.trainer.skipped is not None:
                found.append(steps.trainer.skipped)
        if phase == 0 and steps.trainer.aligned:
            steps.terminate()
    trainer = steps.trainer
    averages = [average.module for average in trainer.projector_emas.values()]
    for module in (trainer.module, trainer.ema.module, *averages):
        found += [p.detach().clone() for p in module.parameters()]
    found += [v.clone() for s in trainer.optimizer.state.values() for v in s.values()]
    assert not any(group["capturable"] for group in trainer.optimizer.param_groups)
    return found


@pytest.mark.parametrize(
    ("cut", "changes", "clips"),
    [
        ("maps", {}, True),
        ("activations", {**MICRO, **SKIP}, True),
        ("reg", {}, False),
        ("text", MICRO, False),
    ],
    ids=str,
)
def test_replayed_steps_are_those_of_python(
    stores: Callable[..., Store],
    monkeypatch: pytest.MonkeyPatch,
    cut: str,
    changes: dict[str, Any],
    clips: bool,
) -> None:
    store, options = stores("maps" if cut in {"reg", "text"} else cut), {}
    if cut in {"reg", "text"}:
        store, options = {"reg": reg, "text": text}[cut](store)
    changes = {**options, **changes, "steps": 2 * PHASE, "optimizer": {"max_grad_norm": 0.05}}
    monkeypatch.setattr(ClippedAdamW, "clips_in_update", clips)
    with open_steps(store, CPU, changes) as steps:
        expected = both_phases(steps)
    with open_steps(store, CPU, changes) as steps, cpu_graphs() as graphs:
        steps.trainer._graph = StepGraph(steps.trainer._step)
        found = both_phases(steps)
    assert [graph.replays for graph in graphs] == [1, 3]  # Phase I began with a ramp of 2 steps
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_another_form_starts_anew() -> None:
    calls = []

    def double(inputs: dict[str, Any]) -> dict[str, Any]:
        calls.append(len(calls))
        return {"y": 2 * inputs["x"], "none": None}

    with cpu_graphs() as graphs:
        step = StepGraph(double)
        kept = []
        for number in range(WARM_UP + 3):
            kept.append(step({"x": torch.full((2,), float(number)), "z": None}, key=1))
        assert [out["y"].tolist() for out in kept] == [[2.0 * n] * 2 for n in range(WARM_UP + 3)]
        assert len(calls) == WARM_UP + 1
        assert [graph.replays for graph in graphs] == [3]
        for other in ({"x": torch.zeros(3), "z": None}, {"x": torch.zeros(2), "z": torch.zeros(1)}):
            before = len(calls)
            step(other, key=1)
            assert len(calls) == before + 1
        step.drop()
        assert step._graph is None


def test_a_step_that_waits_cannot_be_captured(stores: Callable[..., Store]) -> None:
    def reads(x: Tensor) -> Tensor:
        return x * x.sum().item()

    with cpu_graphs():
        step = StepGraph(reads)
        for _ in range(WARM_UP):
            step(torch.ones(2), key=0)
        with pytest.raises(UserError, match=r"not permitted .*--compute\.cuda-graphs false"):
            step(torch.ones(2), key=0)
        assert not step.capturing


@needs_cuda_build
@pytest.mark.parametrize(
    ("cut", "changes"), [("maps", {}), ("activations", {**MICRO, **SKIP})], ids=str
)
def test_rehearsal(stores: Callable[..., Store], cut: str, changes: dict[str, Any]) -> None:
    """Python launches copies of inputs and outputs and one graph; only its capture waits."""
    changes = {**GRAPHS, **changes, "steps": 2 * PHASE}
    with FakeGpu() as gpu, open_steps(stores(cut), CUDA, changes) as steps:
        for _ in range(2):
            steps.take(WARM_UP)
            gpu.waits.clear()
            steps.take(1)  # captured
            assert [event.what for event in gpu.waits] == ["synchronize, before a capture"]
            gpu.waits.clear()
            before = gpu.operations
            steps.take(2)
            assert (gpu.operations - before) / 2 < 40
            assert gpu.waits == []
            if steps.trainer.aligned:
                steps.terminate()
                assert steps.trainer._graph is not None
                assert steps.trainer._graph._graph is None  # its memory is freed
    assert [graph.replays for graph in gpu.graphs] == [3, 3]
    assert all(len(graph.inputs) > 100 for graph in gpu.graphs)
    assert gpu.races == []


@needs_cuda_build
def test_memory_that_a_graph_reads_must_stay(stores: Callable[..., Store]) -> None:
    with FakeGpu() as gpu, open_steps(stores("maps"), CUDA, {**GRAPHS, "steps": 9}) as steps:
        steps.take(WARM_UP + 1)
        assert gpu.races == []
        student = steps.trainer.module.student
        student.pos_embed = student.pos_embed.clone()
        steps.take(1)
    assert [event.what for event in gpu.races] == ["a graph reads memory that was freed"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"workers": {"count": 2}}, "one worker"),
        ({"compute": {"cuda_graphs": True, "optimizer": "plain"}}, "compute.optimizer fused"),
    ],
)
def test_what_graphs_cannot_do_is_refused(
    stores: Callable[..., Store], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        run_config(stores("maps"), {**GRAPHS, **changes})


def test_a_checkpoint_of_the_plain_optimizer_is_refused(stores: Callable[..., Store]) -> None:
    with open_steps(stores("maps"), CPU, {"compute": {"optimizer": "plain"}}) as steps:
        steps.take(1)
        state = steps.trainer.state_dict()
    with open_steps(stores("maps"), CPU) as steps:
        steps.trainer._graph = StepGraph(steps.trainer._step)
        with pytest.raises(UserError, match="trained with the plain one"):
            steps.trainer.load_state_dict(state)


def test_graphs_are_of_gpus(stores: Callable[..., Store]) -> None:
    with open_steps(stores("maps"), CPU, GRAPHS) as steps:
        assert steps.trainer._graph is None
        assert steps.trainer.config.model_dump()["compute"]["cuda_graphs"]
    with open_steps(stores("maps"), CPU) as steps:
        assert "cuda_graphs" not in steps.trainer.config.model_dump()["compute"]
