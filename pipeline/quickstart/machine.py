"""The machine: devices, memory and free space, and the weights that are at hand."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.storage.hub import HubUnreachableError, hub_access
from pipeline.text import describe_bytes

CORE_FLOPS = 3.5e10
"""Sustained FLOP/s of one CPU core in small networks in float32."""
GPU_FLOPS = 5e13
"""Sustained FLOP/s of a GPU in bfloat16 in networks of this size, which do not fill it."""


@dataclass(frozen=True)
class Machine:
    """Hardware of this machine."""

    cores: int
    gpus: int
    gpu_name: str
    gpu_bytes: int
    memory_bytes: int
    free_bytes: int
    """Free space on the disk of the work folder."""
    shared_bytes: int
    """Shared memory, where Ray holds objects."""

    @property
    def flops(self) -> float:
        """Sustained FLOP/s of all devices."""
        return self.gpus * GPU_FLOPS if self.gpus else self.cores * CORE_FLOPS

    def describe(self) -> str:
        device = f"{self.gpus} x {self.gpu_name}" if self.gpus else "no GPU"
        sizes = {
            "memory": self.memory_bytes,
            "free disk": self.free_bytes,
            "shared memory": self.shared_bytes,
        }
        shown = ", ".join(f"{describe_bytes(size)} of {name}" for name, size in sizes.items())
        return f"{device}, {self.cores} CPU cores, {shown}"


def look_at_machine(work: Path) -> Machine:
    """Facts about this machine; ``work`` need not exist."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    first = torch.cuda.get_device_properties(0) if gpus else None
    existing = next(path for path in [work, *work.parents] if path.exists())
    shared = Path("/dev/shm")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (limit,), (quota, *period) = _limit("memory.max"), _limit("cpu.max")
    cores = len(os.sched_getaffinity(0))
    if quota is not None and period and period[0]:
        cores = max(1, min(cores, int(quota / period[0])))
    return Machine(
        cores=cores,
        gpus=gpus,
        gpu_name=first.name if first else "",
        gpu_bytes=first.total_memory if first else 0,
        memory_bytes=memory if limit is None else min(memory, limit),
        free_bytes=shutil.disk_usage(existing).free,
        shared_bytes=shutil.disk_usage(shared).free if shared.exists() else 0,
    )


def _limit(name: str) -> list[int | None]:
    """Numbers of a container's limit (cgroup v2); None where there is no limit."""
    try:
        words = Path("/sys/fs/cgroup", name).read_text().split()
    except OSError:
        words = []
    return [int(word) if word.isdigit() else None for word in words] or [None]


def at_hand(repo: str, filename: str) -> str | None:
    """Reason why weights of the hub cannot be loaded; None if they are cached or the hub answers.
    Takes 5 seconds at most, and none with HF_HUB_OFFLINE."""
    try:
        with hub_access(repo, [filename]):
            return None
    except HubUnreachableError as error:
        return str(error)
