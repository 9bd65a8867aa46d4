"""Kernels that Inductor writes for an H100, made and assembled without a GPU.

A function is traced with fake CUDA tensors, lowered with an H100's properties, and each Triton
kernel of the result is compiled for sm_90 by the ptxas in triton's wheel. Nothing runs. Inductor's
internals are used; ``missing()`` says why they cannot be, where they have moved.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.gpu.fake_gpu import FakeGpu

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=50 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    is_integrated=0,
    clock_rate=1_980_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
    gcnArchName="",
)
INTERFACE = "torch._dynamo.device_interface.CudaInterface"


@dataclass(frozen=True)
class Graph:
    """One compiled graph: a forward pass, its backward pass, or one without gradients."""

    kind: str
    kernels: tuple[tuple[str, str], ...]
    """Name and source of each Triton kernel; equal ones are there once."""
    launches: int
    """Calls of Triton kernels."""
    library_calls: int
    """Matrix products, convolutions and attention."""
    bytes_moved: int
    """Read and written by Triton kernels, if each tensor passes once."""
    library_bytes: int
    flops: int
    """Those of the library calls."""


def missing() -> str | None:
    """Reason why kernels cannot be made here; None: they can."""
    if not torch.backends.cuda.is_built():
        return "this build of torch has no CUDA"
    try:
        import triton.runtime
        from torch._functorch.aot_autograd import aot_function  # noqa: F401
        from torch._inductor.graph import GraphLowering
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
        from triton.backends.compiler import GPUTarget

        GPUTarget("cuda", 90, 32)
        _ = GraphLowering.count_bytes, CachingAutotuner._precompile_config
        _ = triton.runtime.driver._active
    except (ImportError, AttributeError) as error:
        return f"internals of Inductor or triton have moved: {error}"
    return None


class CudaAttention(TorchFunctionMode):
    """Flash attention, as a GPU would choose, because the choice itself asks the driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]


class _Driver:
    """``triton.runtime.driver.active`` of a machine with an H100."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_current_stream(self, device: object = None) -> int:
        return 0


class _Device:
    """``torch.cuda.device`` as a context."""

    def __init__(self, device: object = None) -> None:
        self.idx, self.prev_idx = 0, -1

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@contextlib.contextmanager
def fake_h100() -> Iterator[None]:
    """A fake GPU whose properties are an H100's, for ``lower`` and ``assemble``."""
    import triton.runtime
    from torch._inductor.fx_passes import joint_graph, post_grad

    post_grad.lazy_init()  # patterns are traced on the CPU
    joint_graph.lazy_init()
    no_state = torch.zeros(16, dtype=torch.uint8)
    patches: dict[str, Any] = {
        "torch.cuda.get_device_properties": lambda device=None: H100,
        "torch.cuda.device": _Device,
        "torch.cuda._utils._get_device_index": lambda device, optional=False, allow_cpu=False: 0,
        "torch.cuda.get_rng_state": lambda device=None: no_state,
        "torch.cuda.set_rng_state": lambda state, device=None: None,
        f"{INTERFACE}.Worker.get_device_properties": staticmethod(lambda device=None: H100),
        f"{INTERFACE}.get_device_properties": staticmethod(lambda device=None: H100),
        f"{INTERFACE}.is_available": staticmethod(lambda: True),
        f"{INTERFACE}.current_device": staticmethod(lambda: 0),
        f"{INTERFACE}.get_compute_capability": staticmethod(lambda device=None: 90),
        f"{INTERFACE}.is_triton_capable": staticmethod(lambda device=None: True),
        f"{INTERFACE}.raise_if_triton_unavailable": staticmethod(lambda device=None: None),
        "torch.utils._triton.has_triton": lambda: True,
        "torch._inductor.config.joint_graph_constant_folding": False,  # it makes real tensors
        "torch._inductor.config.shape_padding": False,  # it times products
        "torch._inductor.runtime.triton_helpers.set_driver_to_gpu": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeGpu(watch=False))
        for target, replacement in patches.items():
            stack.enter_context(mock.patch(target, replacement))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver()))
        stack.enter_context(CudaAttention())
        yield


def lower(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Graph]:
    """Graphs of ``function``: forward and backward, or one without gradients."""
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    found: list[Graph] = []
    backward: list[Any] = []

    def compiler(kind: str) -> Callable[..., Any]:
        def compile(module: Any, example: Any) -> Any:
            found.append(_graph(kind, module, example))
            return lambda *args: module.forward(*args)

        return compile

    def partition(module: Any, joint_inputs: Any, **options: Any) -> Any:
        joint_graph_passes(module)
        options["compiler"] = "inductor"
        parts = min_cut_rematerialization_partition(module, joint_inputs, **options)
        backward.append(parts[1])
        return parts

    traced = aot_function(
        function,
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=compiler("inference"),
        partition_fn=partition,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    try:
        traced(*inputs)
    except Exception:
        if not found:
            raise  # afterwards, only the run on fake tensors has failed
    if backward and len(found) == 1:  # it is compiled when a gradient first arrives
        nodes = backward[0].graph.nodes
        compiler("backward")(backward[0], [n.meta["val"] for n in nodes if n.op == "placeholder"])
    return found


def _graph(kind: str, module: Any, inputs: Any) -> Graph:
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    view_to_reshape(module)
    fake = torch._guards.detect_fake_mode(inputs)
    with V.set_fake_mode(fake):
        post_grad_passes(module, kind == "inference")
    graph = GraphLowering(
        module,
        example_inputs=inputs,
        is_inference=kind == "inference",
        is_backward=kind == "backward",
    )
    with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]), DebugContext():
        with V.set_fake_mode(fake):
            graph.run(*inputs)
            code = graph.codegen()
        _, nodes, _ = graph.count_bytes()
    source = code[0] if isinstance(code, tuple) else code
    text = str(getattr(source, "value", source))
    body = text[text.rfind("def call(") :]
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", text, re.S)
    # count_bytes divides the bytes of each node by 4: it counts float32 numbers
    library = [4 * size for node, size in nodes if "Extern" in type(node).__name__]
    own = [4 * size for node, size in nodes if "Extern" not in type(node).__name__]
    return Graph(
        kind,
        tuple(kernels),
        launches=len(re.findall(r"\btriton_\w+\.run\(", body)),
        library_calls=len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.aten\.\w+\.\w+\(", body)),
        bytes_moved=round(sum(own)),
        library_bytes=round(sum(library)),
        flops=_flops(module),
    )


def _flops(module: Any) -> int:
    """FLOPs of the products and of attention in a graph."""
    from torch.utils.flop_counter import flop_registry

    total = 0
    for node in module.graph.nodes:
        count = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if node.op == "call_function" and count is not None:
            args, kwargs = torch.utils._pytree.tree_map(_value, (node.args, node.kwargs))
            total += int(count(*args, **kwargs, out_val=_value(node)))
    return total


def _value(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, torch.fx.Node) else node


def functional(module: nn.Module, count: int) -> Callable[..., Any]:
    """The module's forward pass as a function of ``count`` inputs and then its parameters."""
    names = [name for name, _ in module.named_parameters()]

    def call(*args: Tensor) -> Any:
        weights = dict(zip(names, args[count:], strict=True))
        out = torch.func.functional_call(module, weights, args[:count])
        leaves = torch.utils._pytree.tree_leaves(out)
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    return call


def assemble(graph: Graph, folder: Path) -> dict[str, int]:
    """Compile every kernel of a graph, in each configuration that Inductor would time, for sm_90.
    Returns bytes of machine code by kernel."""
    return {name: _assemble(name, source, folder) for name, source in graph.kernels}


def _assemble(name: str, source: str, folder: Path) -> int:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tuner = getattr(module, name)
    size = 0
    for config in tuner.configs:
        kernel = tuner._precompile_config(config).kernel
        if hasattr(kernel, "asm"):
            assert ".target sm_90" in kernel.asm["ptx"]
            size += len(kernel.asm["cubin"])
        else:  # a static launcher has the machine code alone
            size += len(kernel.cubin_raw or b"")
    return size
