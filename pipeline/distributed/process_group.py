"""Rank, device and collective operations of a training worker."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed.sharding import is_sharded

PARAMETERS = inspect.signature(DistributedDataParallel).parameters
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in PARAMETERS else "broadcast_buffers"
"""Name of the option, which depends on the version of torch."""


@dataclass(frozen=True)
class ProcessGroup:
    """Rank and device of this worker; the process group is torch's default one."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module in DistributedDataParallel; unchanged if there is one worker, or if it is
        sharded."""
        if self.world_size == 1 or any(map(is_sharded, module.parameters())):
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        options: dict[str, Any] = {BUFFERS: False}  # position tables, which never change
        return DistributedDataParallel(
            module, device_ids=ids, gradient_as_bucket_view=True, **options
        )

    def sync_gradients(self, wrapped: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
        """Context in which a backward pass of the wrapped module averages gradients over the
        workers or, not ``enabled``, only accumulates this worker's own."""
        synchronise: Any = getattr(wrapped, "set_requires_gradient_sync", None)
        if synchronise is not None:  # the module is sharded
            synchronise(enabled)
        if enabled or not isinstance(wrapped, DistributedDataParallel):
            return nullcontext()
        return wrapped.no_sync()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all workers, in place."""
        if self.world_size > 1:
            moved = values.to(self.device)  # NCCL needs GPU tensors, a resumed trigger has none
            dist.all_reduce(moved)
            if moved is not values:
                values.copy_(moved)
        return values

    def gather(self, values: Tensor) -> list[list[float]]:
        """The vectors of all ranks in float64, one row per rank; see ``scatter_saved``."""
        table = torch.zeros(self.world_size, len(values), dtype=torch.float64, device=self.device)
        table[self.rank] = values.to(self.device, torch.float64)
        rows: list[list[float]] = self.sum(table).tolist()
        return rows

    def concatenate(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n, K), int64, of all workers, whose numbers n may differ, by rank."""
        if self.world_size == 1:
            return rows
        counts = [int(count) for (count,) in self.gather(torch.tensor([len(rows)]))]
        own = torch.zeros(max(counts), rows.shape[1], dtype=torch.int64, device=self.device)
        own[: len(rows)] = torch.from_numpy(rows)
        parts = [torch.empty_like(own) for _ in counts]
        dist.all_gather(parts, own)
        kept = [part[:count] for part, count in zip(parts, counts, strict=True)]
        return torch.cat(kept).cpu().numpy()

    def scatter_saved(self, rows: list[list[float]]) -> list[float]:
        """This rank's part of saved rows of ``gather``, so that sums over the ranks are unchanged:
        its own row, or if the number of ranks has changed, the sum of all rows on rank 0."""
        if len(rows) == self.world_size:
            return rows[self.rank]
        total = [sum(column) for column in zip(*rows, strict=True)]
        return total if self.is_main else [0.0] * len(total)

    def broadcast_int(self, value: int) -> int:
        """The ``value`` of rank 0, on every rank."""
        return self.sum_counts({"value": value if self.is_main else 0})["value"]

    def union(self, numbers: set[int]) -> set[int]:
        """Union over all workers of small sets of integers >= 0."""
        own = sorted(numbers)
        width = max(int(row[0]) for row in self.gather(torch.tensor([len(own)])))
        if not width:
            return set()
        padded = torch.tensor([*own, *[-1] * (width - len(own))])
        return {int(number) for row in self.gather(padded) for number in row if number >= 0}

    def sum_counts(self, counts: dict[str, int]) -> dict[str, int]:
        """Sums of integers over all workers, which must pass the same keys."""
        names = sorted(counts)
        numbers = [counts[name] for name in names]
        sums = self.sum(torch.tensor(numbers, dtype=torch.int64, device=self.device)).tolist()
        return dict(zip(names, sums, strict=True))
