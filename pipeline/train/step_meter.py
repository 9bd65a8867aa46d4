"""Means of losses and rates of steps between two rows of the metrics."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipeline.alignment.aligned_student import LOSSES
from pipeline.distributed.process_group import ProcessGroup
from pipeline.models.flops import STEP, peak_tflops, student_flops
from schemas.student import StudentConfig


class StepMeter:
    """Sums of losses on the device, because reading them at each step would wait for it."""

    def __init__(
        self, group: ProcessGroup, global_batch: int, losses: Sequence[str] = LOSSES
    ) -> None:
        """``losses``: names of the losses in the result of ``Trainer.train_step``."""
        self.group = group
        self.global_batch = global_batch
        self.losses = losses
        self._sums: Tensor | None = None
        self._skipped: Tensor | None = None  # steps that count for no mean, on the device
        self.steps = 0
        self._timed_steps = 0  # steps of this process only
        self._waited = 0.0
        self._began = time.perf_counter()
        self.seconds = 0.0
        """Duration of the last row."""

    def add(self, losses_and_norm: Tensor, waited: float, skipped: Tensor | None = None) -> None:
        """Add the result of ``Trainer.train_step``, the seconds spent waiting for data, and
        ``Trainer.skipped``."""
        if skipped is not None:
            losses_and_norm = torch.where(skipped, 0, losses_and_norm)
            self._skipped = skipped.long() if self._skipped is None else self._skipped + skipped
        self._sums = losses_and_norm if self._sums is None else self._sums + losses_and_norm
        self.steps += 1
        self._timed_steps += 1
        self._waited += waited

    def take(self, names: Collection[str]) -> dict[str, float]:
        """Means over all workers since the last call, of the losses in ``names``, and rates. Every
        rank calls it."""
        assert self._sums is not None
        waited = self._sums.new_tensor([self._waited])
        values = self.group.sum(torch.cat([self._sums, waited])).tolist()
        self.seconds = seconds = time.perf_counter() - self._began
        world = self.group.world_size
        row: dict[str, float] = {}
        *sums, norms, waits = values
        skipped = 0 if self._skipped is None else int(self._skipped)
        measured = self.steps - skipped
        if measured:
            for name, total in zip(self.losses, sums, strict=True):
                if name in names:
                    row[name] = total / (measured * self.global_batch)
            row["grad_norm"] = norms / (measured * world)  # the same on every rank
        if self._skipped is not None:
            row["skipped_steps"] = skipped
        row["steps_per_second"] = self._timed_steps / seconds
        row["images_per_second"] = self._timed_steps * self.global_batch / seconds
        row["data_wait_share"] = min(waits / (world * seconds), 1.0)
        self.restart()
        return row

    def leave_out(self, seconds: float) -> None:
        """Subtract time that was not spent on training."""
        self._began += seconds

    def restart_clock(self) -> None:
        """Measure time from now on."""
        self._began = time.perf_counter()

    def restart(self) -> None:
        """Drop all sums; measure time from now on."""
        self._sums, self._skipped, self.steps, self._waited = None, None, 0, 0.0
        self._timed_steps = 0
        self.restart_clock()

    def state_dict(self) -> dict[str, Any]:
        """Sums of the row that is not written yet. Every rank calls it."""
        sums = None if self._sums is None else self.group.gather(self._sums)
        skipped = {} if self._skipped is None else {"skipped": int(self._skipped)}
        return {"steps": self.steps, "sums": sums, **skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the row of ``state_dict()``. Its rates are those of the steps from now on."""
        self.restart()
        if state["sums"] is not None:
            *sums, _ = self.group.scatter_saved(state["sums"])
            norms = state["sums"][0][-1]  # not a sum over ranks: each adds the same norm
            self._sums = torch.tensor([*sums, norms], device=self.group.device)
            self.steps = int(state["steps"])
        if "skipped" in state:
            self._skipped = torch.tensor(int(state["skipped"]), device=self.group.device)


class PhaseClock:
    """Steps per second of each phase; the first step after a pause is left out."""

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
        """Steps per second; None where no step of the phase was measured."""
        return self._steps[phase] / self._seconds[phase] if self._steps[phase] else None


TERA = 1e12


class Throughput:
    """TFLOP/s and MFU, from the FLOPs of the student alone, so that runs are comparable."""

    def __init__(self, student: StudentConfig, group: ProcessGroup) -> None:
        self._student = student
        self._workers = group.world_size
        self._peak = None
        if group.device.type == "cuda":
            self._peak = peak_tflops(torch.cuda.get_device_name(group.device))

    @cached_property
    def _flops(self) -> float:
        """Counted when it is needed, because that takes longer than a small step."""
        return STEP * student_flops(self._student)

    def rates(self, images_per_second: float) -> dict[str, float]:
        """``tflops_per_worker`` and, on GPUs with a known data sheet, ``mfu``: the share of the
        dense bfloat16 peak."""
        rate = images_per_second * self._flops / TERA / self._workers
        rates = {"tflops_per_worker": rate}
        if self._peak is not None:
            rates["mfu"] = rate / self._peak
        return rates
