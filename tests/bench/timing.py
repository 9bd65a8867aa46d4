"""Measurement of time and memory on a device."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from schemas.errors import UserError


@dataclass(frozen=True)
class Clock:
    """Measures wall seconds until the work is done on a GPU, and CPU seconds of this process on a
    CPU, because those exclude other processes."""

    device: torch.device

    @staticmethod
    def of(choice: str) -> Clock:
        available = torch.cuda.is_available()
        if choice == "cuda" and not available:
            raise UserError("--device cuda: this machine has no GPU that torch can use")
        return Clock(torch.device("cuda" if available and choice != "cpu" else "cpu"))

    @property
    def name(self) -> str:
        if self.device.type == "cuda":
            return str(torch.cuda.get_device_name())
        return f"CPU, {torch.get_num_threads()} threads"

    @property
    def about(self) -> str:
        return "wall" if self.device.type == "cuda" else "CPU seconds of the process"

    def time(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            return time.perf_counter() - start
        start = time.process_time()
        call()
        # CPU seconds of all threads are summed; the mean is the time that passed
        return (time.process_time() - start) / torch.get_num_threads()


def peak_of(make: Callable[[], Any]) -> float:
    """Peak bytes of GPU memory while the stepper that ``make`` returns takes a few steps alone,
    after those in which Inductor times kernels with buffers of its own."""
    gc.collect()
    torch.cuda.empty_cache()
    stepper = make()
    stepper.take(3)
    torch.cuda.reset_peak_memory_stats()
    stepper.take(3)
    peak = float(torch.cuda.max_memory_allocated())
    del stepper
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def peak_in_child(options: Any, name: str) -> float:
    """Peak bytes of memory of a new process while it takes a few steps, less those before."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(options, name, send))
    process.start()
    send.close()
    try:
        return float(receive.recv())
    finally:
        process.join()


def _child(options: Any, name: str, send: Any) -> None:
    from tests.bench.steps import in_temporary_folder

    torch.set_num_threads(options.threads)
    with in_temporary_folder(options, name) as make:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which was the data's
        before = peak_memory()
        make().take(3)
        send.send(peak_memory() - before)


def peak_memory() -> int:
    """Peak resident bytes of this process since its start or the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
