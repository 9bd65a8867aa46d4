"""A training step as one CUDA graph: one launch instead of those of its more than a thousand
kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from schemas.errors import UserError

WARM_UP = 3
"""Equal steps before one is captured: kernels are compiled and timed, and the optimizer's state is
made, which a capture cannot contain."""


class StepGraph:
    """Calls a function on a GPU, once it was called equally a few times as a captured graph.

    A graph repeats kernels with the addresses and Python numbers of its capture. Therefore inputs
    are copied into tensors that it owns and outputs are copied from them, whatever else the
    function reads must stay in place, and Python numbers that it depends on belong to ``key``. The
    memory of a call stays reserved while there is a graph (PyTorch, CUDA semantics, "CUDA Graphs").
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        """``function`` takes and returns nested tensors of the GPU. It must not wait for the GPU,
        copy from the host or use another stream."""
        self.capturing = False
        self._function = function
        self._key: Hashable = None
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: Any = None

    def __call__(self, inputs: Any, key: Hashable) -> Any:
        """``function(inputs)``. A call unlike the one before, in ``key`` or structure, shapes or
        dtypes of the inputs, frees the graph and starts anew. Raises ``UserError`` where the
        function cannot be captured."""
        leaves, structure = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        forms = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves]
        key = (key, structure, *forms)
        if key != self._key:
            self.drop()
            self._key = key
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._function(inputs)
        if self._graph is None:
            self._graph = self._capture(inputs)
        torch._foreach_copy_(self._inputs, tensors)
        self._graph.replay()
        return tree_map_only(Tensor, torch.clone, self._outputs)  # the next replay overwrites them

    def _capture(self, inputs: Any) -> torch.cuda.CUDAGraph:
        own = tree_map_only(Tensor, torch.clone, inputs)
        self._inputs = [leaf for leaf in tree_flatten(own)[0] if isinstance(leaf, Tensor)]
        graph = torch.cuda.CUDAGraph()
        self.capturing = True
        try:
            # meanwhile threads read and pin batches, which a "global" capture forbids
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self._function(own)
        except RuntimeError as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"a step cannot be captured ({first}): set --compute.cuda-graphs false"
            ) from error
        finally:
            self.capturing = False
        return graph

    def drop(self) -> None:
        """Free the graph and its memory."""
        self._key, self._calls = None, 0
        self._graph, self._inputs, self._outputs = None, [], None
