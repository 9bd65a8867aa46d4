"""Means and rates between two rows of the metrics."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.alignment.aligned_student import LOSSES
from pipeline.distributed.process_group import ProcessGroup
from pipeline.models.flops import STEP, peak_tflops, student_flops
from schemas.student import StudentConfig


class StepMeter:
    """Collects steps without looking at their numbers, which would make the device wait."""

    def __init__(self, parallel: ProcessGroup, global_batch: int) -> None:
        self.parallel = parallel
        self.global_batch = global_batch
        self._sums: Tensor | None = None
        self.steps = 0
        self._timed_steps = 0  # those of this process
        self._waited = 0.0
        self._began = time.perf_counter()
        self.seconds = 0.0
        """That the last row took."""

    def add(self, losses_and_norm: Tensor, waited: float) -> None:
        """One step: what ``Trainer.train_step`` returned, and seconds spent waiting for data."""
        self._sums = losses_and_norm if self._sums is None else self._sums + losses_and_norm
        self.steps += 1
        self._timed_steps += 1
        self._waited += waited

    def take(self, names: Collection[str]) -> dict[str, float]:
        """Means over all workers since the last call, in which every worker takes part; of the
        losses, those in ``names``."""
        assert self._sums is not None
        waited = self._sums.new_tensor([self._waited])
        values = self.parallel.sum(torch.cat([self._sums, waited])).tolist()
        self.seconds = seconds = time.perf_counter() - self._began
        world = self.parallel.world_size
        row: dict[str, float] = {}
        *sums, norms, waits = values
        for name, total in zip(LOSSES, sums, strict=True):
            if name in names:
                row[name] = total / (self.steps * self.global_batch)
        row["grad_norm"] = norms / (self.steps * world)  # the same on every rank
        row["steps_per_second"] = self._timed_steps / seconds
        row["images_per_second"] = self._timed_steps * self.global_batch / seconds
        row["data_wait_share"] = min(waits / (world * seconds), 1.0)
        self.restart()
        return row

    def leave_out(self, seconds: float) -> None:
        """Do not count time that was spent on something else than training."""
        self._began += seconds

    def restart_clock(self) -> None:
        """Time counts from here."""
        self._began = time.perf_counter()

    def restart(self) -> None:
        """Forget what was collected; time counts from here."""
        self._sums, self.steps, self._waited = None, 0, 0.0
        self._timed_steps = 0
        self.restart_clock()

    def state_dict(self) -> dict[str, Any]:
        """The sums of a row that is not written yet; every rank calls it."""
        sums = None if self._sums is None else self.parallel.gather(self._sums)
        return {"steps": self.steps, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with such a row. Its rates will be those of the steps from here on."""
        self.restart()
        if state["sums"] is not None:
            *sums, _ = self.parallel.scatter_saved(state["sums"])
            norms = state["sums"][0][-1]  # no sum over ranks: each of them adds the same
            self._sums = torch.tensor([*sums, norms], device=self.parallel.device)
            self.steps = int(state["steps"])


class PhaseClock:
    """Steps per second of each phase, less the first step after every pause."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._steps = {1: 0, 2: 0}
        self._seconds = {1: 0.0, 2: 0.0}

    def tick(self, phase: int) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self._steps[phase] += 1
            self._seconds[phase] += now - self._last
        self._last = now

    def pause(self) -> None:
        self._last = None

    def rate(self, phase: int) -> float | None:
        """None where the phase had no step to measure."""
        return self._steps[phase] / self._seconds[phase] if self._steps[phase] else None


TERA = 1e12


class Throughput:
    """FLOPs of the student alone, whatever else a step computes: what makes runs comparable."""

    def __init__(self, student: StudentConfig, parallel: ProcessGroup) -> None:
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
