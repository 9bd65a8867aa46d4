"""Profiler trace of a few steps."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.distributed.process_group import ProcessGroup

STEPS = 2


class StepTrace:
    """Records steps ``first`` to ``first + STEPS - 1`` of the main rank."""

    def __init__(self, folder: Path, group: ProcessGroup, first: int | None) -> None:
        self._folder = folder
        self._first = first if group.is_main else None
        self._group = group
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Start or stop recording before step ``step``, counted from 1."""
        if self._profile is not None and step >= (self._first or 0) + STEPS:
            self.close()
        if step == self._first:
            activities = [ProfilerActivity.CPU]
            if self._group.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def close(self) -> None:
        """Write the trace, if one was recorded."""
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        if self._group.device.type == "cuda":
            torch.cuda.synchronize(self._group.device)  # else the last kernels are missing
        recorded.stop()
        path = self._folder / f"trace-{self._first}.json"
        temporary = path.with_suffix(".tmp")
        recorded.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
