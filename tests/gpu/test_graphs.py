"""Graphs that torch.compile makes of a run: none is split, none is made after the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo import config as dynamo
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from pipeline.sampling.generate import draw_latents
from pipeline.store import Store
from schemas.diffusion import SamplerConfig
from tests.gpu.steps import open_steps, reg, text

CPU = torch.device("cpu")
symbolic: list[torch.SymInt] = []


@pytest.fixture(autouse=True)
def trace_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo and autograd work as on a GPU; kernels are not compiled. Reaching Dynamo's limit, from
    which on a function is run uncompiled, is an error."""
    original = torch.compile

    def backend(graph: Any, inputs: list[Any]) -> Any:
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        symbolic.extend(value for value in values if isinstance(value, torch.SymInt))
        return aot_eager(graph, inputs)

    def compile(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **{**options, "backend": backend})

    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    counters.clear()
    symbolic.clear()
    with dynamo.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


SECOND = {"feature_weight": 0.25, "feature_depth": 3, "student_layers": [1], "teacher_layers": [4]}
RECIPES = {
    "projector": "conv",
    "projector_kernel": 3,
    "normalisation": "spatial",
    "normalisation_strength": 0.6,
    "others": [SECOND],
}
"""Three more graphs: the other projector, other attention layers, and the normalisation."""


@pytest.mark.parametrize(
    ("cut", "class_token", "alignment", "first_step"),
    [
        ("maps", False, {}, 5),
        ("activations", False, {}, 5),
        ("maps", True, {}, 5),
        ("maps", False, RECIPES, 8),
    ],
)
def test_graphs_of_a_run(
    stores: Callable[..., Store],
    cut: str,
    class_token: bool,
    alignment: dict[str, Any],
    first_step: int,
) -> None:
    store = stores(cut)
    options: dict[str, Any] = {}
    if class_token:
        store, options = reg(store)
    changes: dict[str, Any] = {
        "steps": 9,
        "student": {"depth": 5, **options.get("student", {})},
        # the first block is not tapped, as in papers
        "alignment": {"student_layers": [1, 2], **alignment},
        "compute": {"compile": "on"},
        "precision": "bfloat16",
    }
    made: dict[str, int] = {}

    def count(name: str, call: Callable[[], object]) -> None:
        before = graphs()
        call()
        made[name] = graphs() - before

    sampler = SamplerConfig.model_validate({"method": "ode", "steps": 1, "guidance": 1.5})
    with open_steps(store, CPU, changes) as steps:
        student = steps.trainer.ema.module
        count("first step", lambda: steps.take(1))
        steps.trainer.factor = 0.5  # of a ramp
        count("second step", lambda: steps.take(1))
        count("probe", lambda: steps.probe.gradient_cosines([0.1], 3))
        count("sampling", lambda: draw_latents(student, [1, 2, 3], sampler))
        count("third step", lambda: steps.take(1))
        count("termination", steps.terminate)
        count("Phase II", lambda: steps.take(2))
    assert made.pop("first step") == first_step
    assert set(made.values()) == {0}, made
    assert sum(counters["graph_break"].values()) == 0
    assert symbolic == []  # sizes are constants


@pytest.mark.parametrize("last_tapped", [False, True])
def test_graphs_of_a_run_with_captions(stores: Callable[..., Store], last_tapped: bool) -> None:
    """The last block is a variant of its own, because its text tokens end there."""
    store, options = text(stores("maps"))
    made: dict[str, int] = {}

    def count(name: str, call: Callable[[], object]) -> None:
        before = graphs()
        call()
        made[name] = graphs() - before

    changes: dict[str, Any] = {
        "steps": 9,
        "student": {"depth": 5, **options["student"]},
        "alignment": {"student_layers": [1, 4] if last_tapped else [1, 2]},
        "compute": {"compile": "on"},
        "precision": "bfloat16",
    }
    with open_steps(store, CPU, changes) as steps:
        count("first step", lambda: steps.take(1))
        count("second step", lambda: steps.take(1))
        count("probe", lambda: steps.probe.gradient_cosines([0.1], 3))
        count("termination", steps.terminate)
        count("Phase II", lambda: steps.take(2))
    assert made.pop("first step") == 6
    # a tapped last block has not been run without taps before
    assert made.pop("Phase II") == int(last_tapped)
    assert set(made.values()) == {0}, made
    assert sum(counters["graph_break"].values()) == 0
    assert symbolic == []  # sizes are constants


def test_a_fall_back_to_uncompiled_code_is_reported(
    stores: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    """Tapped and untapped blocks are two variants."""
    limits = dynamo.patch(recompile_limit=1, fail_on_recompile_limit_hit=False)
    with limits, open_steps(stores("maps"), CPU, {"compute": {"compile": "on"}}) as steps:
        steps.take(1)
    (warning,) = [r.getMessage() for r in caplog.records if "--compute.compile" in r.getMessage()]
    assert "'forward'" in warning
    assert "\n" not in warning
