"""How hard a run makes its devices work."""

from __future__ import annotations

import torch

from pipeline.distributed.process_group import Parallel
from pipeline.models.flops import STEP, peak_tflops, student_flops
from schemas.student import StudentConfig

TERA = 1e12


class Effort:
    """FLOPs of the student alone, whatever else a step computes: what makes runs comparable."""

    def __init__(self, student: StudentConfig, parallel: Parallel) -> None:
        self._flops = STEP * student_flops(student)
        self._workers = parallel.world_size
        self._peak = None
        if parallel.device.type == "cuda":
            self._peak = peak_tflops(torch.cuda.get_device_name(parallel.device))

    def rates(self, images_per_second: float) -> dict[str, float]:
        """``tflops_per_worker`` and, of a GPU whose data sheet is known, ``mfu``: the share of its
        dense bfloat16 peak."""
        rate = images_per_second * self._flops / TERA / self._workers
        rates = {"tflops_per_worker": rate}
        if self._peak is not None:
            rates["mfu"] = rate / self._peak
        return rates
