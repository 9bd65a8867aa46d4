"""The backward pass in Python, because torch's engine asks CUDA for contexts, also of fakes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Grads = Sequence[Tensor | None]


def backward(tensors: Tensor | Sequence[Tensor], grads: Any = None, **_: Any) -> None:
    """In place of ``torch.autograd.backward``: adds to ``.grad`` of the leaves."""
    outputs = _listed(tensors)
    _walk(outputs, _listed(grads) if grads is not None else [None] * len(outputs))


def grad(
    outputs: Any, inputs: Any, grad_outputs: Any = None, allow_unused: bool = False, **_: Any
) -> tuple[Tensor | None, ...]:
    """In place of ``torch.autograd.grad``."""
    outputs, inputs = _listed(outputs), _listed(inputs)
    given = _listed(grad_outputs) if grad_outputs is not None else [None] * len(outputs)
    found = _walk(outputs, given, [_edge(tensor) for tensor in inputs])
    if not allow_unused and any(value is None for value in found):
        raise RuntimeError("one of the inputs was not used in the graph")
    return tuple(found)


@torch.no_grad()
def _walk(
    outputs: Sequence[Tensor], grads: Grads, wanted: Sequence[tuple[Any, int]] | None = None
) -> list[Tensor | None]:
    """Gradients at the edges (node, slot) of ``wanted``; None: add those of all leaves to them."""
    arrived: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    for tensor, given in zip(outputs, grads, strict=True):
        _add(arrived, _edge(tensor), torch.ones_like(tensor) if given is None else given)
    found: list[Tensor | None] = [None] * len(wanted or ())
    ordered = _in_order([_edge(tensor)[0] for tensor in outputs])
    needed = set(ordered) if wanted is None else _leading_to({edge[0] for edge in wanted}, ordered)
    for node in ordered:
        slots = arrived.pop(node, {})
        for place, (target, slot) in enumerate(wanted or ()):
            if target is node:
                found[place] = slots.get(slot)
        if not slots or node not in needed:
            continue
        if hasattr(node, "variable"):  # a leaf
            if wanted is None:
                leaf, new = node.variable, slots[0]
                leaf.grad = new if leaf.grad is None else leaf.grad + new
            continue
        given = [slots.get(slot) for slot in range(len(node._input_metadata))]
        call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
        results = call(*given)
        results = results if isinstance(results, tuple | list) else (results,)
        for edge, value in zip(node.next_functions, results, strict=True):
            if edge[0] is not None and value is not None:
                _add(arrived, edge, value)
    return found


def _leading_to(targets: set[Any], ordered: Sequence[Any]) -> set[Any]:
    """Nodes before one of the targets, as the engine runs no others."""
    found: set[Any] = set()
    for node in reversed(ordered):
        if any(following in targets or following in found for following, _ in node.next_functions):
            found.add(node)
    return found


def _in_order(roots: Sequence[Any]) -> list[Any]:
    """All nodes of the graph, each after those that lead to it."""
    pending, seen, stack = Counter(), set(roots), list(set(roots))
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                pending[following] += 1
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    ready, ordered = [node for node in set(roots) if not pending[node]], []
    while ready:
        ordered.append(node := ready.pop())
        for following, _ in node.next_functions:
            if following is not None:
                pending[following] -= 1
                if not pending[following]:
                    ready.append(following)
    return ordered


def _edge(tensor: Tensor) -> tuple[Any, int]:
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    return torch.autograd.graph.get_gradient_edge(tensor)[:2]


def _add(arrived: dict[Any, dict[int, Tensor]], edge: tuple[Any, int], value: Tensor) -> None:
    """Add a gradient in the shape and dtype of its tensor, as the engine makes it."""
    node, slot = edge
    expected, slots = node._input_metadata[slot], arrived[node]
    assert value.device == expected.device, (value.device, expected.device)
    if value.shape != tuple(expected.shape):
        value = value.sum_to_size(expected.shape)
    if value.dtype != expected.dtype:
        value = value.to(expected.dtype)
    slots[slot] = slots[slot] + value if slot in slots else value


def _listed(values: Any) -> list[Any]:
    return [values] if isinstance(values, Tensor) else list(values)
