"""Kernels, bytes and predicted times of a training step on an H100, counted without a GPU.

Compiled parts are lowered by Inductor for sm_90 (``tests.gpu.inductor``); what runs uncompiled is
counted operation by operation on fake CUDA tensors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline.alignment.fused_attention_loss import rows_gradient, rows_loss
from pipeline.models.layers import FinalLayer
from pipeline.models.projector import Projector
from pipeline.models.sit import Block
from pipeline.store.codecs import find_codec
from pipeline.targets.cuts import CODEC_SETS
from pipeline.teachers.attention_tap import AttentionOperands
from pipeline.teachers.vit import create_meta_vit
from pipeline.train.step_graph import WARM_UP
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.student import StudentConfig
from tests.bench.options import ArithmeticOptions as Options
from tests.bench.report import Heading, Report, Row, Table
from tests.encoded import encode
from tests.gpu.fake_gpu import CUDA, FakeGpu
from tests.gpu.inductor import fake_h100, functional, lower, missing
from tests.gpu.steps import open_steps

HEADINGS = (
    Heading("part", "part"),
    Heading("count", "a step", ".0f"),
    Heading("launches", "kernels", ".0f"),
    Heading("library", "library calls", ".0f"),
    Heading("mb", "MB moved", ",.0f"),
    Heading("library_mb", "MB, library", ",.0f"),
    Heading("gflop", "GFLOP", ",.0f"),
    Heading("ms", "ms", ".3f"),
)
BASELINE = (Heading("baseline_mb", "MB, baseline", ",.0f"), Heading("ratio", "/ baseline", ".2f"))
NOT_A_KERNEL = {
    "view",
    "_unsafe_view",
    "detach",
    "alias",
    "empty_like",
    "empty",
    "_has_same_storage",
}
DECODED = "stored tokens decoded"
UPDATE = {
    "norm of gradients": ("linalg_vector_norm", "_foreach_norm"),
    "clipping": ("mul_", "_foreach_mul_"),
    "AdamW": ("_fused_adamw_",),
    "average (EMA)": ("_foreach_lerp_",),
}
"""Operations of the parts of an update; torch does not group fake tensors as it does real ones."""


@dataclass
class Traffic:
    """Traffic of one part, done once."""

    launches: int = 0
    library: int = 0
    bytes: int = 0
    library_bytes: int = 0
    flops: int = 0


def run(options: Options) -> Report:
    reason = missing()
    if reason is not None:
        raise UserError(f"the arithmetic cannot be counted here: {reason}")
    torch.set_num_threads(options.threads)
    size = _student(options)
    parts = [*_compiled(options, size), *_tail(options), *_update(size)]
    rows = [_row(name, count, traffic, options) for name, count, traffic in parts]
    headings = HEADINGS
    if options.baseline is not None:
        before = {row["part"]: row for row in _baseline(options)}
        for row in rows:
            old = before.get(row["part"])
            if old is not None:
                row["baseline_mb"] = old["mb"]
                row["ratio"] = row["mb"] / old["mb"] if old["mb"] else None
        headings = (*HEADINGS, *BASELINE)
    total = {
        "ms_per_step": sum(row["ms"] * row["count"] for row in rows),
        "launches_per_step": sum((row["launches"] + row["library"]) * row["count"] for row in rows),
        "update_bytes_per_weight": _bytes_per_weight(parts, size),
    }
    ms = {row["part"]: row["ms"] for row in rows}
    total["decoding_share_of_step"] = ms[DECODED] / total["ms_per_step"]
    total |= _phase_1_extra(ms, options.tapped)
    total["launches_with_cuda_graphs"] = _replayed()
    about = {
        "counted for": f"{options.batch} samples, bfloat16, one H100; predicted, not measured",
        "rates": f"{options.tflops:g} TFLOP/s of products, {options.tb_per_second:g} TB/s else",
    }
    return Report(about, [Table(options.student, headings, rows)], total)


def _phase_1_extra(ms: dict[str, float], tapped: int) -> dict[str, float]:
    """Milliseconds of a step of Phase I beyond one without alignment, by the store's cut. Of
    ``activations`` the teacher's last ``tapped`` + 1 blocks run; decoding of tokens is left out."""
    if not tapped:
        return {}
    passes = ("forward", "backward")
    blocks = [ms[f"tapped block, {name}"] - ms[f"block, {name}"] for name in passes]
    losses = ms["attention loss"] + ms["its gradient"]
    both = sum(ms[f"projector, {name}"] for name in passes) + tapped * (sum(blocks) + losses)
    teacher = (tapped + 1) * ms["teacher's block"] + ms["its probabilities"]
    return {
        "phase_1_extra_ms_maps": both + ms["maps decoded"],
        "phase_1_extra_ms_activations": both + teacher,
    }


Part = tuple[str, int, Traffic]


def _student(options: Options) -> StudentConfig:
    names = ("depth", "width", "heads")
    changes = {name: getattr(options, name) for name in names if getattr(options, name)}
    student = StudentConfig.model_validate({"model": options.student, **changes})
    if options.tapped > student.size.depth:
        raise UserError(f"--tapped {options.tapped}: the student has {student.size.depth} blocks")
    return student


def _row(name: str, count: int, traffic: Traffic, options: Options) -> dict[str, Any]:
    """``count`` of 0: the part is not in such a step."""
    seconds = traffic.flops / (options.tflops * 1e12) + traffic.bytes / (
        options.tb_per_second * 1e12
    )
    return {
        "part": name,
        "count": count,
        "launches": traffic.launches,
        "library": traffic.library,
        "mb": traffic.bytes / 1e6,
        "library_mb": traffic.library_bytes / 1e6,
        "gflop": traffic.flops / 1e9,
        "ms": seconds * 1e3,
    }


def _compiled(options: Options, student: StudentConfig) -> Iterator[Part]:
    """Blocks, final layer, projector, attention loss and decoding of maps, as Inductor lowers."""
    batch, size = options.batch, student.size
    width, heads = size.width, size.heads
    tokens = student.grid[0] * student.grid[1]
    tapped_heads = min(12, heads)
    block, final = Block(width, heads), FinalLayer(width, size.patch_size, student.latent_channels)
    projector = Projector(width, 2048, 768)
    index = torch.arange(options.tapped or 1)
    with fake_h100():
        for module in (block, final, projector):
            module.to(CUDA)
        x = torch.empty(batch, tokens, width, device=CUDA, requires_grad=True)
        c = torch.empty(batch, width, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        depth = size.depth - options.tapped
        for name, count, taps in (("block", depth, 0), ("tapped block", options.tapped, heads)):
            block.tapped_heads = min(taps, tapped_heads)
            yield from _graphs(name, count, functional(block, 2), [x, c, *block.parameters()])
        inputs = [x, c, *final.parameters()]
        yield from _graphs("final layer", 1, functional(final, 2), inputs)
        inputs = [x, *projector.parameters()]
        yield from _graphs("projector", 1, functional(projector, 1), inputs)
        shape = (batch, tokens, heads, width // heads)
        q, k = (
            torch.empty(shape, device=CUDA, dtype=torch.bfloat16).transpose(1, 2)[:, :tapped_heads]
            for _ in range(2)
        )
        maps = torch.empty(batch, index.numel(), tapped_heads, tokens, tokens, device=CUDA)
        rows = torch.empty(batch, tapped_heads, tokens, device=CUDA)
        grad = torch.empty(batch, device=CUDA)
        layers, loss = options.tapped, [q, k, maps[:, 0]]
        with torch.no_grad():
            yield from _graphs("attention loss", layers, rows_loss, loss, cast=False)
            inputs = [*loss, rows, grad]
            yield from _graphs("its gradient", layers, rows_gradient, inputs, cast=False)
            stored = torch.empty(
                batch, 5, tapped_heads, tokens, tokens, device=CUDA, dtype=torch.uint8
            )
            codec = find_codec("cbrt8")

            def decode(stored: Tensor, layers: Tensor) -> Tensor:
                return codec.decode({"": stored.index_select(1, layers)}).float()

            inputs = [stored, torch.empty(index.numel(), dtype=torch.int64, device=CUDA)]
            yield from _graphs("maps decoded", 1, decode, inputs, cast=False)


def _graphs(
    name: str,
    count: int,
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    cast: bool = True,
) -> Iterator[Part]:
    with torch.autocast("cuda", torch.bfloat16, enabled=cast):
        graphs = lower(function, inputs)
    for graph in graphs:
        title = name if graph.kind == "inference" else f"{name}, {graph.kind}"
        yield (
            title,
            count,
            Traffic(
                graph.launches,
                graph.library_calls,
                graph.bytes_moved,
                graph.library_bytes,
                graph.flops,
            ),
        )


def _tail(options: Options) -> Iterator[Part]:
    """One block of DINOv2-B in the trainer, for cuts 'activations' and 'image', compiled as there
    and, beside it, uncompiled; the device's part of decoding what it reads, which is all but the
    copy into the batch."""
    vit, _ = create_meta_vit(ExtractConfig().teacher, ExtractConfig().resolution)
    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
    with fake_h100(), torch.no_grad():
        block = vit.blocks[-1].to_empty(device=CUDA)
        x = torch.empty(options.batch, tokens, vit.embed_dim, device=CUDA)
        inputs = [x, *block.parameters()]
        yield from _graphs("teacher's block", 0, functional(block, 1), inputs)
        with Counting() as counting, torch.autocast("cuda", torch.bfloat16):
            block(x)
    yield "teacher's block, eager", 0, counting.total()
    with fake_h100(), torch.no_grad():
        codec = find_codec(CODEC_SETS["faithful"]["activations"])
        arrays = codec.arrays((tokens, vit.embed_dim))
        stored = [
            torch.empty(
                options.batch,
                *array.shape,
                dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype,
                device=CUDA,
            )
            for array in arrays.values()
        ]

        def decode(*parts: Tensor) -> Tensor:
            return codec.decode(dict(zip(arrays, parts, strict=True)))

        yield from _graphs(DECODED, 0, decode, stored, cast=False)
        heads = vit.blocks[-1].attn.num_heads
        shape = (options.batch, heads, tokens, vit.embed_dim // heads)
        count, prefix = 2 * (options.tapped or 1), vit.num_prefix_tokens
        operands = [torch.empty(shape, device=CUDA, dtype=torch.bfloat16) for _ in range(count)]

        def probabilities(*operands: Tensor) -> Tensor:
            """As ``ReplayedTargets.replay`` makes them of its tapped layers."""
            pairs = zip(operands[::2], operands[1::2], strict=True)
            read = [AttentionOperands(q, k, q, 0.125, True).logits(prefix) for q, k in pairs]
            return torch.softmax(torch.stack(read, dim=1), dim=-1)

        yield from _graphs("its probabilities", 0, probabilities, operands, cast=False)


def _update(student: StudentConfig) -> Iterator[Part]:
    """Norm, clipping, AdamW and average of a step that the trainer takes, for the weights of
    ``student``: a small one is counted, because bytes grow with the weights alone. Each is one
    launch, although many weights take several."""
    vanilla = {"alignment": {"feature_weight": 0, "attention_weight": 0, "termination": None}}
    with tempfile.TemporaryDirectory() as folder:
        store = encode(Path(folder) / "store", cut="maps")
        with FakeGpu(), open_steps(store, CUDA, vanilla) as steps, Counting() as counting:
            steps.take(2)
            counting.by_name.clear()  # moments were made
            steps.take(1)
            weights = sum(p.numel() for p in steps.trainer.module.parameters())
    scale = _weights(student) / weights
    for title, operations in UPDATE.items():
        moved = sum(counting.by_name.get(name, Traffic()).bytes for name in operations)
        yield title, 1, Traffic(int(moved > 0), bytes=round(moved * scale))


def _replayed() -> int:
    """Launches by Python of a step of Phase I with ``compute.cuda_graphs``: copies and the graph,
    equally many for any student."""
    with tempfile.TemporaryDirectory() as folder:
        store = encode(Path(folder) / "store", cut="maps")
        changes = {"steps": WARM_UP + 2, "compute": {"cuda_graphs": True}}
        changes["alignment"] = {"termination": {"step": WARM_UP + 2}}
        with FakeGpu() as gpu, open_steps(store, CUDA, changes) as steps:
            steps.take(WARM_UP + 1)
            before = gpu.operations
            steps.trainer.train_step(steps.next_batch())
            return gpu.operations - before


def _weights(student: StudentConfig) -> int:
    from pipeline.models import make_student

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_student(student).parameters())


def _bytes_per_weight(parts: Sequence[Part], student: StudentConfig) -> float:
    total = sum(traffic.bytes for name, _, traffic in parts if name in UPDATE)
    return total / _weights(student)


class Counting(TorchDispatchMode):
    """Operations that would launch a kernel, and their bytes, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, Traffic] = {}

    def total(self) -> Traffic:
        out = Traffic()
        for name, one in self.by_name.items():
            library = name in {getattr(op, "__name__", "") for op in flop_registry}
            out.library += one.launches if library else 0
            out.launches += 0 if library else one.launches
            out.library_bytes += one.bytes if library else 0
            out.bytes += 0 if library else one.bytes
            out.flops += one.flops
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        aliases = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if aliases or name in NOT_A_KERNEL:
            return out
        one = self.by_name.setdefault(name, Traffic())
        one.launches += 1
        one.bytes += _read_and_written(func, args, kwargs, out)
        count = flop_registry.get(func.overloadpacket)
        one.flops += int(count(*args, **kwargs, out_val=out)) if count is not None else 0
        return out


def _read_and_written(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    given |= kwargs
    total = _bytes(list(given.values()))
    for argument in func._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if argument.name == "grads":  # AdamW writes them back only where it scales them
            written = given.get("grad_scale") is not None
        if written:
            total += _bytes(given.get(argument.name))
    if not any(result.alias_info for result in func._schema.returns):
        total += _bytes(out)
    return total


def _bytes(values: Any) -> int:
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def _baseline(options: Options) -> list[Row]:
    """Rows of the same count with ``pipeline`` and ``schemas`` of another checkout."""
    assert options.baseline is not None
    with _other_sources(options.baseline.resolve()) as folder:
        given = options.model_dump(exclude={"baseline", "as_json"}, exclude_none=True)
        flags = [part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", str(v))]
        command = [sys.executable, "-m", "tests.bench", "arithmetic", "--json", *flags]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"--baseline '{options.baseline}' cannot be counted: {last[:200]}")
    rows: list[Row] = next(iter(json.loads(done.stdout)["tables"].values()))
    return rows


@contextmanager
def _other_sources(checkout: Path) -> Iterator[Path]:
    """A folder with these tests, and the other folders of ``checkout``."""
    if not (checkout / "pipeline").is_dir():
        raise UserError(f"--baseline '{checkout}': not a checkout of this project")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for room in ("pipeline", "schemas", "jobs"):
            (folder / room).symlink_to(checkout / room)
        (folder / "tests").symlink_to(Path(__file__).parents[1])
        yield folder
