"""A GPU that is not there: fake CUDA tensors, and a log of all that would make Python wait.

    with FakeGpu() as gpu:
        ...code that computes on torch.device("cuda")...
    assert gpu.waits == gpu.races == []

``FakeTensorMode`` has shapes, dtypes and devices but neither memory nor kernels, and refuses
operands on different devices. Above it, a dispatch mode judges copies between devices and
questions about values, and notes the stream of each operation. Arithmetic on the CPU is real.
Values that come back from the GPU are zeros; questions about them are answered (0, True) after
they have been noted.

Not seen: dtypes that CUDA kernels lack, numbers, memory, speed, compiled code, NCCL.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.gpu import backward

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
SOURCES = tuple(f"{ROOT}/{folder}/" for folder in ("pipeline", "jobs", "tests"))
aten = torch.ops.aten

needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(),
    reason="fake CUDA tensors need a build of torch with CUDA (a GPU is not needed)",
)
QUESTIONS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}


class Event(NamedTuple):
    """Something that a test asserts about, and the lines of the project that led there."""

    what: str
    place: tuple[str, ...]
    """``file:function:line``, the innermost first."""
    thread: str

    def inside(self, function: str) -> bool:
        return any(line.split(":")[1] == function for line in self.place)


class Stream:
    """The order of a stream's work as a vector clock: ``clock[s]`` is the number of operations of
    stream s that are done before whatever this stream does next."""

    def __init__(self, device: object = None, **_: object) -> None:
        self.clock: dict[Stream, int] = defaultdict(int)

    def wait_stream(self, other: Stream) -> None:
        self._merge(other.clock)

    def wait_event(self, event: CudaEvent) -> None:
        self._merge(event.clock)

    def _merge(self, clock: dict[Stream, int]) -> None:
        for stream, time in clock.items():
            self.clock[stream] = max(self.clock[stream], time)

    def record_event(self, event: CudaEvent | None = None) -> CudaEvent:
        event = event or CudaEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        FakeGpu.active.note_wait("stream.synchronize")

    def query(self) -> bool:
        return True


class CudaEvent:
    def __init__(self, **_: object) -> None:
        self.clock: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or FakeGpu.active.current).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or FakeGpu.active.current).wait_event(self)

    def synchronize(self) -> None:
        FakeGpu.active.note_wait("event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: CudaEvent) -> float:
        return 1.0


class Memory:
    """Use of one storage on the GPU."""

    def __init__(self, storage: torch.UntypedStorage, stream: Stream) -> None:
        self.alive = StorageWeakRef(storage)  # its address is not reused while this refers to it
        self.owner = stream
        self.written: tuple[Stream, int] | None = None
        self.recorded: set[Stream] = set()
        self.unrecorded: dict[Stream, Event] = {}


class Graph:
    """A CUDA graph: what its kernels read that was there before, which must stay there."""

    def __init__(self) -> None:
        self.inputs: dict[int, StorageWeakRef] = {}
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        gpu = FakeGpu.active
        gpu.operations += 1
        if any(storage.expired() for storage in self.inputs.values()):
            gpu._races.append(_event("a graph reads memory that was freed"))


class FakeGpu(contextlib.ExitStack):
    active: FakeGpu

    def __init__(self, *, watch: bool = True) -> None:
        """``watch``: log waits and races; without it, graphs can be traced for the compiler."""
        super().__init__()
        self._watch = watch
        self.waits: list[Event] = []
        self._races: list[Event] = []
        self.operations = 0
        """On the GPU, by Python: those of a capture do not count, its replay is one."""
        self.graphs: list[Graph] = []
        self.capturing: Graph | None = None
        self._made: set[int] = set()  # storages made by the present capture
        self.current = self.default = Stream()
        self._memory: dict[int, Memory] = {}
        self._pinned: dict[int, tuple[int, object]] = {}

    @property
    def races(self) -> list[Event]:
        """Reads that do not wait for a write on another stream, and tensors of one stream used on
        another without ``record_stream``."""
        unrecorded = [event for m in self._memory.values() for event in m.unrecorded.values()]
        return [*self._races, *unrecorded]

    def waits_inside(self, function: str) -> list[Event]:
        """Waits while a function of this name of the project was running."""
        return [event for event in self.waits if event.inside(function)]

    def note_wait(self, what: str) -> None:
        self.waits.append(_event(what if self.capturing is None else f"{what}, in a capture"))

    def __enter__(self) -> FakeGpu:
        super().__enter__()
        FakeGpu.active = self
        for target, replacement in self._patches().items():
            self.enter_context(mock.patch(target, replacement))
        self.enter_context(FakeMode(allow_non_fake_inputs=True))
        if self._watch:
            self.enter_context(Watch(self))
        return self

    def _patches(self) -> dict[str, Any]:
        return {
            "torch.cuda.Stream": Stream,
            "torch.cuda.Event": CudaEvent,
            "torch.cuda.stream": self._use_stream,
            "torch.cuda.current_stream": self._current_stream,
            "torch.cuda.default_stream": lambda device=None: self.default,
            "torch.cuda.synchronize": lambda device=None: self.note_wait("synchronize"),
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.is_initialized": lambda: True,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
            "torch.cuda.get_device_capability": lambda device=None: (9, 0),
            "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
            "torch.cuda.empty_cache": lambda: None,
            "torch.cuda.is_current_stream_capturing": lambda: self.capturing is not None,
            "torch.cuda.CUDAGraph": Graph,
            "torch.cuda.graph": self._capture,
            "torch.cuda._lazy_init": lambda: None,
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch._subclasses.fake_tensor.init_gpu_context": lambda device: None,
            "torch.empty": self._empty(torch.empty),
            "torch.Tensor.pin_memory": lambda tensor, device=None: self._pin(tensor),
            "torch.Tensor.is_pinned": lambda tensor, device=None: self._is_pinned(tensor),
            "torch.Tensor.record_stream": lambda tensor, stream: self._record_stream(
                tensor, stream
            ),
            "torch.Tensor.backward": lambda t, gradient=None, **_: backward.backward(
                t, None if gradient is None else [gradient]
            ),
            "torch.autograd.backward": backward.backward,
            "torch.autograd.grad": backward.grad,
            "torch.nn.Module._apply": _apply,
        }

    @contextlib.contextmanager
    def _use_stream(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def _current_stream(self, device: object = None) -> Stream:
        if device is not None and torch.device(device).type != "cuda":  # type: ignore[call-overload]
            raise ValueError(f"expected a CUDA device, got {device}")
        return self.current

    @contextlib.contextmanager
    def _capture(self, graph: Graph, *, capture_error_mode: str) -> Iterator[None]:
        self.note_wait("synchronize, before a capture")
        before, self.capturing = self.operations, graph
        self._made.clear()
        try:
            yield
        finally:
            self.operations, self.capturing = before, None
        self.graphs.append(graph)

    # host memory

    def _empty(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
            if not pin_memory:
                # torch.device, as a context, recognises torch.empty by identity
                options["device"] = options.get("device") or torch.get_default_device()
                return original(*size, **options)
            with _disable_current_modes():
                return self._pinned_memory(original(*size, **options))

        return empty

    def _pin(self, tensor: Tensor) -> Tensor:
        if self._is_pinned(tensor):
            return tensor
        with _disable_current_modes():
            return self._pinned_memory(tensor.clone())

    def _pinned_memory(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[tensor.data_ptr()] = max(1, storage.nbytes()), storage
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor) or tensor.device.type != "cpu":
            return False
        at = tensor.data_ptr()
        return any(start <= at < start + size for start, (size, _) in list(self._pinned.items()))

    def copied(self, source: Tensor, target: Tensor | str, non_blocking: bool) -> None:
        """Note a copy between devices that blocks. ``target``: a tensor or the type of a device."""
        to = target if isinstance(target, str) else _device(target).type
        if _device(source).type == to:
            return
        host = source if to == "cuda" else target
        pinned = isinstance(host, Tensor) and self._is_pinned(host)
        if not (pinned and non_blocking):
            kind = "blocking" if pinned else "pageable"
            self.note_wait(f"{kind} copy to {to}, {tuple(source.shape)} {source.dtype}")

    # streams

    def read(self, tensor: Tensor) -> None:
        if self.capturing is not None and _device(tensor).type == "cuda":
            storage = tensor.untyped_storage()
            if storage._cdata not in self._made:
                self.capturing.inputs[storage._cdata] = StorageWeakRef(storage)
        memory = self._memory_of(tensor)
        if memory is None or memory.written is None:
            return
        stream, time = memory.written
        if stream is not self.current and self.current.clock[stream] < time:
            self._races.append(_event("read on a stream that does not wait for the write"))
        known = {memory.owner, *memory.recorded, *memory.unrecorded}
        if self.current not in known:
            memory.unrecorded[self.current] = _event("used without record_stream")

    def wrote(self, tensor: Tensor) -> None:
        if self.capturing is not None and _device(tensor).type == "cuda":
            known = tensor.untyped_storage()._cdata
            if known not in self.capturing.inputs:
                self._made.add(known)
        memory = self._memory_of(tensor)
        if memory is not None:
            stream = self.current
            stream.clock[stream] += 1
            memory.written = stream, stream.clock[stream]

    def _record_stream(self, tensor: Tensor, stream: Stream) -> None:
        memory = self._memory_of(tensor)
        if memory is not None:
            memory.recorded.add(stream)
            memory.unrecorded.pop(stream, None)

    def _memory_of(self, tensor: Tensor) -> Memory | None:
        if _device(tensor).type != "cuda":
            return None
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = Memory(storage, self.current)
        return self._memory[storage._cdata]


class FakeMode(FakeTensorMode):
    avoid_device_init = True  # although a GPU seems to be available


class Watch(TorchDispatchMode):
    """Sees every operation before ``FakeTensorMode`` does."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return _device(args[0])
        leaves = tree_leaves((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inference = torch.is_inference_mode_enabled() or any(t.is_inference() for t in inputs)
        if inference and _is_composite(func):
            with self:  # otherwise autograd has taken them apart before
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if not any(_is_on_gpu(leaf) for leaf in leaves):
            with _disable_current_modes():
                return func(*args, **kwargs)
        self.gpu.operations += 1
        for tensor in inputs:
            self.gpu.read(tensor)
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            device, source = kwargs["device"].type, args[0]
            self.gpu.copied(source, device, kwargs.get("non_blocking", False))
            if device == "cpu":
                with _disable_current_modes():
                    return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        elif func is aten.copy_.default:
            target, source = args[:2]
            self.gpu.copied(source, target, args[2] if len(args) > 2 else False)
            if _device(target).type == "cpu":
                with _disable_current_modes():
                    return target.zero_()
        elif func in QUESTIONS:
            self.gpu.note_wait(str(func))
            return _answer(func, *inputs)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.gpu.note_wait(str(func))
            return _answer(func, *inputs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.gpu.wrote(leaf)
        return out


def _is_composite(func: Any) -> bool:
    attention = aten.scaled_dot_product_attention.default
    return func.namespace == "aten" and func is not attention and func._can_decompose()


def _is_on_gpu(leaf: object) -> bool:
    if isinstance(leaf, torch.device):
        return leaf.type == "cuda"
    return isinstance(leaf, FakeTensor)  # also those on the CPU, which have no values


def _device(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _answer(func: Any, tensor: Tensor, *others: Tensor) -> Any:
    if func is aten._local_scalar_dense.default and tensor.dtype != torch.bool:
        return 0.0 if tensor.is_floating_point() else 0
    if func in QUESTIONS:
        return True
    if func is aten.nonzero.default:  # none
        return tensor.new_empty((0, tensor.dim()), dtype=torch.int64)
    if func is aten.index.Tensor:  # a boolean mask of all rows
        return tensor.clone()
    raise NotImplementedError(func)


def _event(what: str) -> Event:
    lines, frame = [], sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(SOURCES) and code.co_filename != __file__:
            file = code.co_filename.removeprefix(f"{ROOT}/")
            lines.append(f"{file}:{code.co_name}:{frame.f_lineno}")
        frame = frame.f_back
    return Event(what, tuple(lines), threading.current_thread().name)


def _apply(module: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """``Module._apply`` without ``swap_tensors``, which refuses fake tensors."""
    for child in module.children() if recurse else ():
        _apply(child, fn)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                assert parameter.grad is None
                new = torch.nn.Parameter(fn(parameter), parameter.requires_grad)
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return module
