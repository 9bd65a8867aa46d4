"""Number and size of Ray workers: from options and from the resources of the cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.distributed.ray_cluster import require, total

MAX_CPUS_WITH_GPU = 8
"""Default limit of CPUs for a worker that has a GPU."""


@dataclass(frozen=True)
class OptionNames:
    """Command-line options that error messages name."""

    count: str
    cpus: str
    gpus: str


@dataclass(frozen=True)
class WorkerResources:
    """Workers, and the resources that Ray reserves for each of them."""

    count: int
    cpus: float
    gpus: float

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Type of the device that a worker computes on."""
        return "cuda" if self.gpus else "cpu"

    @property
    def threads(self) -> int:
        """CPU threads of a worker: whole CPUs, at least one."""
        return max(1, int(self.cpus))


def choose_resources(
    count: int | None,
    cpus: float | None,
    gpus: float | None,
    *,
    options: OptionNames,
    max_cpu_workers: int | None = None,
) -> WorkerResources:
    """``count`` workers of ``cpus`` and ``gpus`` each on the connected cluster.

    Defaults for None: 1 GPU where the cluster has GPUs, else 0; with GPUs the workers that fit the
    cluster's GPUs, and an equal share of its CPUs, at most ``MAX_CPUS_WITH_GPU``; without GPUs
    1 CPU, and the workers that fit the cluster's CPUs, at most ``max_cpu_workers``. Raises
    ``UserError`` where the cluster can never hold the workers.
    """
    count_option = None if count is None else options.count
    if gpus is None:
        gpus = 1.0 if total("GPU") else 0.0
    if gpus:
        require("GPU", gpus, count or 1, option=count_option or options.gpus)
        count = count or int(total("GPU") // gpus)
        cpus = cpus or min(MAX_CPUS_WITH_GPU, max(1, int(total("CPU") // count)))
    else:
        cpus = cpus or 1
        fitting = max(1, int(total("CPU") // cpus))
        count = count or min(fitting, max_cpu_workers or fitting)
    require("CPU", cpus, count, option=count_option or options.cpus)
    return WorkerResources(count, cpus, gpus)
