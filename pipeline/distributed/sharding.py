"""Weights, gradients and optimizer state divided among workers (FSDP2, ``fully_shard``).

Each worker holds a slice of every tensor along its first dimension, as a ``DTensor``; a part's
weights are gathered for its forward and backward pass only. State dicts hold whole tensors on the
CPU, in both directions, so that files do not depend on the division.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard(module: nn.Module, parts: Iterable[nn.Module], device: torch.device) -> None:
    """Divide a module's parameters among all workers, in place. ``parts`` are gathered one at a
    time, the module's other parameters together. Every rank calls it, with equal weights."""
    from torch.distributed.device_mesh import init_device_mesh  # takes seconds to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*parts, module):
        fully_shard(part, mesh=mesh)


def save_whole(module: nn.Module) -> None:
    """``state_dict`` and ``load_state_dict`` of a sharded module use whole tensors from here on.
    Every rank calls them."""

    def gather(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name, value in state.items():
            if name.startswith(prefix):
                state[name] = whole(value).cpu() if is_sharded(value) else value

    def divide(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, parameter in module.named_parameters():
            if prefix + name in state:
                state[prefix + name] = divided_like(state[prefix + name], parameter)

    module.register_state_dict_post_hook(gather)
    module.register_load_state_dict_pre_hook(divide)


def load_whole_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """``load_state_dict`` uses whole tensors from here on. ``state_dict`` leaves moments divided,
    because each is gathered for the worker alone that writes it (``checkpoints.division``)."""

    def divide(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {
            number: {
                name: divided_like(value, parameters[number]) if value.dim() else value
                for name, value in one.items()
            }
            for number, one in state["state"].items()
        }
        return {**state, "state": moments}

    optimizer.register_load_state_dict_pre_hook(divide)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on its device; another one unchanged. Every rank calls it."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def local(tensor: Tensor) -> Tensor:
    """This rank's slice of a sharded tensor, not copied; another one unchanged."""
    if not is_sharded(tensor):
        return tensor
    own: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return own


def divided_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor divided as ``pattern`` is; unchanged where that is not sharded. All ranks have
    the tensor already: nothing is sent."""
    if not is_sharded(pattern) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = pattern.device_mesh, pattern.placements  # type: ignore[attr-defined]
    moved = tensor.to(pattern.device)
    return distribute_tensor(moved, mesh, placements, src_data_rank=None)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")
