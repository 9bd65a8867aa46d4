"""Memory of a training step on a GPU, counted on fake tensors before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from pipeline.alignment.aligned_student import AlignedStudent, AlignedTeacher, ClassToken
from pipeline.alignment.losses import Targets
from pipeline.cost_estimate.meta_models import Geometry
from pipeline.models.factory import blank_condition
from pipeline.precision import precision_dtype
from schemas.run import RunConfig

CAPACITIES = (40, 80, 141)
"""Memory of an A100, an H100 and an H200 in 10^9 bytes. Each has 6% more, which the fragments of
torch's allocator may take."""
GPU_CONTEXT = 1_000_000_000
"""CUDA's context, cuBLAS's workspaces and buckets of NCCL: assumed."""
COUNTED = (16, 32)
"""Samples for which saved tensors are counted. What is saved grows linearly from one to the other;
the compiler recomputes more where a batch is as small as 1."""
FLOAT32 = 4


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one GPU in Phase I."""

    weights: int
    averages: int
    """EMA of the weights."""
    optimizer: int
    """AdamW's two moments."""
    gradients: int
    """With several workers, DDP's buckets are the gradients."""
    teacher_tail: int
    """Weights of the teacher's blocks that the trainer runs."""
    casts: int
    """Weights in the autocast dtype, saved for the backward pass."""
    kept_per_sample: int
    """Saved for the backward pass."""
    targets_per_sample: int
    """Decoded targets, float32."""
    passing_per_sample: int
    """At most about, for a moment: gradients inside one block, and the logits of one layer."""
    micro_batch: int
    """Samples of one forward pass of this run's first worker."""
    compiled: bool
    """If the compiler decides what is saved (torch.compile)."""

    gpu_context: int = GPU_CONTEXT

    @property
    def fixed(self) -> int:
        state = self.weights + self.averages + self.optimizer + self.gradients
        return state + self.teacher_tail + self.casts + self.gpu_context

    @property
    def per_sample(self) -> int:
        return self.kept_per_sample + self.targets_per_sample + self.passing_per_sample

    def peak(self, samples: int) -> int:
        """Bytes of a step whose forward passes take so many samples."""
        return self.fixed + samples * self.per_sample

    def largest_micro_batch(self, gigabytes: float) -> int:
        """Samples of a forward pass that fit; 0: not one."""
        return max(0, int(gigabytes * 1e9 - self.fixed) // self.per_sample)

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "fixed": self.fixed,
            "peak": self.peak(self.micro_batch),
            "largest_micro_batch": {str(gb): self.largest_micro_batch(gb) for gb in CAPACITIES},
            "basis": "counted, not measured on a GPU",
        }


def step_memory(run: RunConfig, geometry: Geometry, tail_weights: int) -> StepMemory:
    """Memory of an aligned run's steps. ``tail_weights``: number of the teacher's weights that the
    trainer holds."""
    compiled = run.compute.compile != "off"
    few, many = (saved_bytes(run, geometry, samples, compiled=False) for samples in COUNTED)
    per_sample = (many - few) // (COUNTED[1] - COUNTED[0])
    casts = max(0, few - COUNTED[0] * per_sample)
    if compiled:
        total = saved_bytes(run, geometry, COUNTED[1], compiled=True)
        per_sample = (total - casts) // COUNTED[1]
    with torch.device("meta"):
        module = make_module(run, geometry)
        targets = make_targets(run, geometry, 1)
    weights = FLOAT32 * sum(parameter.numel() for parameter in module.parameters())
    gathered = 0
    if run.compute.shard == "fsdp2" and run.workers.count > 1:
        # the weights of two parts, of which one is fetched ahead, and the gradients of one
        largest = max(sum(p.numel() for p in part.parameters()) for part in module.parts)
        weights, gathered = -(-weights // run.workers.count), 3 * FLOAT32 * largest
    share = -(-run.global_batch // run.workers.count)
    return StepMemory(
        weights=weights + gathered,
        averages=weights,
        optimizer=2 * weights,
        gradients=weights,
        teacher_tail=FLOAT32 * tail_weights,
        casts=casts,
        kept_per_sample=per_sample,
        targets_per_sample=_bytes(_tensors(targets)),
        passing_per_sample=per_sample // run.student.size.depth + _logits_bytes(targets),
        micro_batch=min(share, run.workers.micro_batch or share),
        compiled=compiled,
    )


def saved_bytes(run: RunConfig, geometry: Geometry, samples: int, *, compiled: bool) -> int:
    """Bytes that autograd saves in the forward pass of a Phase I step, beside weights and inputs:
    new storages that reach ``saved_tensors_hooks``. ``compiled``: blocks, final layer and projector
    save what Inductor's partitioner chooses."""
    dtype = precision_dtype(run.precision, "cuda")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        module = make_module(run, geometry)
        latents = torch.empty(samples, *run.student.latent_shape)
        condition = blank_condition(run.student, samples)
        noise, time = torch.empty_like(latents), torch.empty(samples)
        noisy, time, target = module.objective.corrupt(latents, noise, time)
        targets = make_targets(run, geometry, samples)
        if compiled:
            _partition_parts(module)
        token, width = None, run.student.class_token
        if width is not None:
            token = ClassToken(*(torch.empty(samples, width) for _ in ClassToken._fields))
        given = [noisy, time, condition, target, *_tensors([*targets, token or ()])]
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with _saved([*module.parameters(), *module.buffers(), *given]) as saved, autocast:
            with FlashAttention():
                losses = module(noisy, time, condition, target, *targets, class_token=token)
            losses.sum()
        return sum(storage.nbytes() for storage in saved.values())


def make_module(run: RunConfig, geometry: Geometry) -> AlignedStudent:
    """The module of a run. The teacher of the first stream stands for those of all streams."""
    teacher = AlignedTeacher(geometry.width, _heads(run, geometry), geometry.grid)
    return AlignedStudent(
        run.student,
        run.alignment,
        teacher_width=teacher.width,
        heads=teacher.heads,
        teacher_grid=teacher.grid,
        others=[teacher] * len(run.alignment.others),
        diffusion=run.diffusion,
        fused=run.compute.attention_loss == "fused",
        class_streams=[
            number
            for number, options in enumerate(run.alignment.streams)
            if run.student.class_token and (options.projector, options.target) == ("mlp", "final")
        ],
    )


def make_targets(run: RunConfig, geometry: Geometry, samples: int) -> list[Targets]:
    """Targets of each stream."""
    tokens, found = geometry.patches, []
    for options in run.alignment.streams:
        features = attention = None
        if options.feature_weight:
            features = torch.empty(samples, tokens, geometry.width)
        if options.attention_weight:
            shape = (len(options.teacher_layers), _heads(run, geometry), tokens, tokens)
            attention = torch.empty(samples, *shape)
        found.append(Targets(features, attention))
    return found


class FlashAttention(TorchFunctionMode):
    """Attention by the kernel that a GPU would use, because fake tensors would choose the plain
    formula, which saves the maps. The CPU's flash kernel saves what CUDA's does: operands, output
    and one number per row."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if torch.is_autocast_enabled("cpu"):
            args = [operand.to(torch.get_autocast_dtype("cpu")) for operand in args]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]


def _heads(run: RunConfig, geometry: Geometry) -> int:
    return min(run.student.size.heads, geometry.heads)


def _tensors(groups: Iterable[Iterable[Tensor | None]]) -> list[Tensor]:
    return [tensor for group in groups for tensor in group if tensor is not None]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _logits_bytes(targets: Iterable[Targets]) -> int:
    """Logits of one layer of one sample: in float32, and before and after that in bfloat16."""
    return max(
        (2 * _bytes([t.attention[:, 0]]) for t in targets if t.attention is not None), default=0
    )


@contextmanager
def _saved(given: Iterable[Tensor]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Storages, other than those ``given``, of the tensors that autograd saves inside."""
    known = {tensor.untyped_storage()._cdata for tensor in given}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _partition_parts(module: AlignedStudent) -> None:
    """Replace the forward passes of the parts that ``compile_parts`` compiles by some that save the
    same tensors: traced, decomposed and partitioned as by Inductor, without its kernels."""
    shared: dict[Any, Callable[..., Any]] = {}
    projectors = (projector for _, projector in module.projectors())
    for part in (*module.student.blocks, module.student.final_layer, *projectors):
        part.forward = partial(_run_partitioned, part, part.forward, shared)


def _run_partitioned(
    part: nn.Module, original: Any, shared: dict[Any, Callable[..., Any]], *inputs: Tensor
) -> Any:
    """Equal parts share one traced function, as compiled blocks do."""
    from torch._functorch.aot_autograd import aot_function  # Inductor takes seconds to import
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    def partition(graph: Any, joint_inputs: Any, **options: Any) -> Any:
        joint_graph_passes(graph)
        options["compiler"] = "inductor"
        return min_cut_rematerialization_partition(graph, joint_inputs, **options)

    def call(weights: dict[str, Tensor], *inputs: Tensor) -> Any:
        part.forward = original
        return torch.func.functional_call(part, weights, inputs)

    names = tuple(name for name, _ in part.named_parameters())
    key = (type(part), getattr(part, "tapped_heads", 0), names, inputs[0].shape)
    if key not in shared:
        shared[key] = aot_function(
            call,
            fw_compiler=lambda graph, _: graph.forward,
            bw_compiler=lambda graph, _: graph.forward,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
    return shared[key](dict(part.named_parameters()), *inputs)
