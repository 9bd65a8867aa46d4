"""Predicted memory of a step against bytes that real tensors hold on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.alignment.aligned_student import AlignedStudent, ClassToken
from pipeline.cost_estimate.memory import (
    GPU_CONTEXT,
    StepMemory,
    make_module,
    make_targets,
    saved_bytes,
    step_memory,
)
from pipeline.cost_estimate.meta_models import Geometry
from pipeline.models.ema import Ema
from schemas.run import RunConfig
from tests.gpu.fake_gpu import FakeGpu, needs_cuda_build

GEOMETRY = Geometry(
    prefix=1,
    grid=(4, 4),
    width=96,
    heads=6,
    head_width=16,
    depth=6,
    layers=(2, 3, 4, 5),
    resolution=32,
    latent_shape=(4, 8, 8),
)
SAMPLES = 24
ARMS = {
    "both losses": {},
    "plain loss": {"compute": {"attention_loss": "plain"}},
    "features": {"alignment": {"attention_weight": 0.0}},
    "attention": {"alignment": {"feature_weight": 0.0}},
    "DiT": {"student": {"model": "DiT-S/2"}, "precision": "bfloat16"},
    "two streams": {"alignment": {"others": [{"feature_depth": 3, "attention_weight": 0}]}},
    "class token": {"student": {"class_token": 96}},
}


def run_config(precision: str = "float32", **changes: dict[str, Any]) -> RunConfig:
    student = {"model": "SiT-S/2", "depth": 4, "width": 96, "heads": 6, "num_classes": 10}
    alignment = {
        "feature_depth": 2,
        "student_layers": [0, 1],
        "teacher_layers": [3, 5],
        "projector_width": 64,
    }
    return RunConfig.model_validate(
        {
            "precision": precision,
            "student": {**student, "latent_size": 8, **changes.pop("student", {})},
            "alignment": {**alignment, **changes.pop("alignment", {})},
            **changes,
        }
    )


class Live(TorchDispatchMode):
    """Bytes of all storages that operations inside have made and that are not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if _is_tensor(leaf)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if _is_tensor(leaf) and leaf.untyped_storage()._cdata not in before:
                storage = leaf.untyped_storage()
                self.found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        self.found = {key: kept for key, kept in self.found.items() if not kept[0].expired()}
        return sum(size for _, size in self.found.values())


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def inputs(run: RunConfig, samples: int = SAMPLES) -> tuple[Any, ...]:
    """Positional arguments of the module, then its class token."""
    latents = torch.zeros(samples, *run.student.latent_shape)
    discrete = run.student.family == "DiT"
    time = torch.zeros(samples, dtype=torch.int64 if discrete else torch.float32)
    labels = torch.zeros(samples, dtype=torch.int64)
    targets, token = make_targets(run, GEOMETRY, samples), None
    if run.student.class_token is not None:
        token = ClassToken(*(torch.zeros(samples, run.student.class_token) for _ in range(3)))
    return latents, time, labels, torch.zeros_like(latents), *targets, token


def losses_of(module: AlignedStudent, given: tuple[Any, ...]) -> Tensor:
    return module(*given[:-1], class_token=given[-1])


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if _is_tensor(leaf)]


@contextmanager
def autocast(run: RunConfig) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=run.precision == "bfloat16"):
        yield


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("arm", ARMS)
def test_saved_bytes_are_those_that_stay_alive(arm: str, precision: str) -> None:
    run = run_config(**{"precision": precision, **ARMS[arm]})
    module, given = make_module(run, GEOMETRY), inputs(run)
    with Live() as live, autocast(run):
        losses = losses_of(module, given)
        alive = live.bytes() - 4 * losses.numel()
    predicted = saved_bytes(run, GEOMETRY, SAMPLES, compiled=False)
    # beside what autograd saves, outputs of views and of the losses themselves are alive
    assert predicted == pytest.approx(alive, rel=0.01)


class CudaAttention(TorchFunctionMode):
    """The kernels that a GPU chooses: flash, or for float32 the efficient one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if args[0].dtype == torch.float32:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]


@needs_cuda_build
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_saves_the_same_bytes(precision: str) -> None:
    """CUDA's autocast casts other operations, and its kernels save other tensors."""
    run = run_config(precision)
    with FakeGpu(), torch.device("cuda"):
        module, given = make_module(run, GEOMETRY), inputs(run)
        known = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
        known |= {t.untyped_storage()._cdata for t in tensors_in(given)}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                saved[storage._cdata] = storage.nbytes()
                keep.append(tensor)
            return tensor

        keep: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        cast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16")
        with hooks, cast, CudaAttention():
            losses_of(module, given).sum()
    predicted = saved_bytes(run, GEOMETRY, SAMPLES, compiled=False)
    assert predicted == pytest.approx(sum(saved.values()), rel=0.02)


def test_a_compiled_step_saves_what_is_predicted() -> None:
    """Dynamo with Inductor's partitioner, on real tensors; kernels are not compiled."""
    assert _compiled_error("aot_eager_decomp_partition", "bfloat16") < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_inductor_saves_what_is_predicted(precision: str) -> None:
    assert _compiled_error("inductor", precision) < 0.02


def _compiled_error(backend: str, precision: str) -> float:
    run = run_config(precision)
    module, given = make_module(run, GEOMETRY), inputs(run)
    known = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    known |= {t.untyped_storage()._cdata for t in tensors_in(given)}
    torch._dynamo.reset()
    for part in (*module.student.blocks, module.student.final_layer, module.projector):
        part.compile(backend=backend)
    with autocast(run):
        losses = losses_of(module, given)
    torch._dynamo.reset()
    saved = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in saved_in_graph(losses)
    }
    actual = sum(size for key, size in saved.items() if key not in known)
    predicted = saved_bytes(run, GEOMETRY, SAMPLES, compiled=True)
    eager = saved_bytes(run, GEOMETRY, SAMPLES, compiled=False)
    assert actual < 0.9 * eager
    return abs(predicted / actual - 1)


def saved_in_graph(output: Tensor) -> list[Tensor]:
    """Tensors that the nodes of the graph hold, found by walking it."""
    found, seen, stack = [], set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        held += list(getattr(node, "saved_tensors", ()))
        found += [leaf for leaf in tree_leaves(held) if isinstance(leaf, Tensor)]
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("arm", ["both losses", "features"])
def test_the_peak_of_a_step_is_predicted(arm: str, precision: str) -> None:
    """All that a trainer holds, made under the count: weights, averages, moments, gradients."""
    run = run_config(**{"precision": precision, "compute": {"compile": "off"}, **ARMS[arm]})
    with Live() as live:
        module = make_module(run, GEOMETRY)
        average = Ema(module, 0.99)
        optimizer = torch.optim.AdamW(module.parameters(), fused=True, foreach=False)
        given = inputs(run)
        for _ in range(2):
            live.peak = 0
            take_step(run, module, optimizer, given)
            average.update(module)
    predicted = step_memory(run, GEOMETRY, tail_weights=0)
    assert predicted.peak(SAMPLES) - GPU_CONTEXT == pytest.approx(live.peak, rel=0.1)


def take_step(run: RunConfig, module: AlignedStudent, optimizer: Any, given: Any) -> None:
    """Two forward passes: gradients of the first are there in the second, as DDP's always are."""
    for _ in range(2):
        with autocast(run):
            losses = losses_of(module, given)
        losses[:3].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def memory(**changes: int) -> StepMemory:
    values = dict.fromkeys(("weights", "averages", "gradients", "casts", "teacher_tail"), 0)
    made = StepMemory(
        **values,
        optimizer=3_000_000_000,
        kept_per_sample=700_000_000,
        targets_per_sample=200_000_000,
        passing_per_sample=100_000_000,
        micro_batch=32,
        compiled=True,
    )
    return replace(made, **changes)


def test_shards_are_divided_among_the_workers() -> None:
    off = {"compile": "off"}
    one = step_memory(run_config(compute=off), GEOMETRY, tail_weights=7)
    sharded = {**off, "shard": "fsdp2"}
    alone = step_memory(run_config(compute=sharded), GEOMETRY, tail_weights=7)
    assert alone == one
    workers = {"count": 4}
    four = step_memory(run_config(compute=sharded, workers=workers), GEOMETRY, tail_weights=7)
    assert four.optimizer == pytest.approx(one.optimizer / 4)
    assert four.averages == four.gradients == pytest.approx(one.gradients / 4)
    largest = 4 * max(sum(p.numel() for p in b.parameters()) for b in _parts(run_config()))
    assert four.weights == four.gradients + 3 * largest
    assert (four.teacher_tail, four.kept_per_sample) == (28, one.kept_per_sample)


def _parts(run: RunConfig) -> list[torch.nn.Module]:
    module = make_module(run, GEOMETRY)
    assert module.projector is not None
    return [*module.student.blocks, module.student.final_layer, module.projector]


def test_the_largest_micro_batch() -> None:
    assert memory().peak(36) == 40_000_000_000
    assert memory().largest_micro_batch(40) == 36
    assert memory(casts=1).largest_micro_batch(40) == 35
    assert memory(weights=40_000_000_000).largest_micro_batch(40) == 0
    assert memory().as_json()["largest_micro_batch"] == {"40": 36, "80": 76, "141": 137}
