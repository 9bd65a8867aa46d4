"""Division of a run's state among the workers that write it."""

from __future__ import annotations

import secrets
from typing import Any

from torch import Tensor

from pipeline.checkpoints.shares import Piece, Share, divide, plan_checksum, share_count
from pipeline.checkpoints.state import OPTIMIZER, CheckpointContents, weights_file
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.sharding import is_sharded, whole


def part_of(contents: CheckpointContents, group: ProcessGroup) -> CheckpointContents:
    """The part of the state that this worker is to write, not copied: its share of a large one, all
    of a small one on the main rank, else no tensor. Every rank calls it with the same state.

    Shares are of equal size but for single tensors, and spread over the nodes. Moments that are
    divided among the workers (FSDP2) are gathered one by one; each is kept by its writer alone.
    """
    world = group.world_size
    if world == 1:
        return contents
    sizes = _sizes(contents)
    count = share_count(sum(sizes.values()), world)
    owners = divide(sizes, count)
    writers = {number * world // count: number for number in range(count)}
    own = writers.get(group.rank)
    share = None
    if count > 1:
        token = f"{group.broadcast_int(secrets.randbits(48)):012x}"
        if own is not None:
            share = Share(own, count, token, plan_checksum(sizes, owners))
    weights = {}
    for name, tensors in contents.weights.items():
        kept = {
            key: tensor for key, tensor in tensors.items() if owners[weights_file(name), key] == own
        }
        if kept or own == 0:  # the first share names every file
            weights[name] = kept
    moments = {}
    for number, values in contents.optimizer.get("state", {}).items():
        gathered = {key: _gathered(value) for key, value in values.items()}
        if owners[OPTIMIZER, number] == own:
            moments[number] = {
                key: value.cpu() if is_sharded(values[key]) else value
                for key, value in gathered.items()
            }
    optimizer = {**contents.optimizer, "state": moments} if contents.optimizer else {}
    return CheckpointContents(weights, optimizer, contents.state, share)


def _gathered(value: Any) -> Any:
    return whole(value) if isinstance(value, Tensor) else value


def _sizes(contents: CheckpointContents) -> dict[Piece, int]:
    """Bytes of each weight, and of each parameter's moments; of whole tensors."""
    sizes: dict[Piece, int] = {
        (weights_file(name), key): tensor.nbytes
        for name, tensors in contents.weights.items()
        for key, tensor in tensors.items()
    }
    for number, values in contents.optimizer.get("state", {}).items():
        sizes[OPTIMIZER, number] = sum(
            value.nbytes for value in values.values() if isinstance(value, Tensor)
        )
    return sizes
