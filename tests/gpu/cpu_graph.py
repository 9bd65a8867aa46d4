"""A CUDA graph's semantics on the CPU: operations are recorded and repeated on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CpuGraph:
    """Repeats operations with the tensors and Python numbers of their recording. Python's own work
    of the recorded function is not repeated, as with ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, outputs in self.calls:
                found = _tensors(function(*args, **kwargs))
                for recorded, new in zip(outputs, found, strict=True):
                    if recorded.data_ptr() != new.data_ptr():  # neither a view nor in place
                        recorded.copy_(new)


class _Recorder(TorchDispatchMode):
    """Operations in place are recorded and undone, because a capture changes no memory."""

    def __init__(self, graph: CpuGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        written = [a for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        targets = _tensors([given.get(argument.name) for argument in written])
        before = [target.clone() for target in targets]
        out = func(*args, **kwargs)
        self.graph.calls.append((func, args, kwargs, _tensors(out)))
        for target, value in zip(targets, before, strict=True):
            target.copy_(value)
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@contextmanager
def cpu_graphs() -> Iterator[list[CpuGraph]]:
    """``torch.cuda.graph`` captures work of the CPU; the graphs that were captured."""
    made: list[CpuGraph] = []

    @contextmanager
    def capture(graph: CpuGraph, *, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        with _Recorder(graph):
            yield
        made.append(graph)

    with mock.patch.multiple("torch.cuda", CUDAGraph=CpuGraph, graph=capture):
        yield made
