"""A run without alignment whose steps are timed, as a program of its own that works with the build
in PYTHONPATH, so that the benches ``checkpoint`` and ``resume`` can time another one too.

Reads one JSON object from its argument: the config, the folder, the number of threads, and the
steps after which to stop without a checkpoint (0: none). Prints one.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pipeline.train.local import train_here
from pipeline.train.trainer import Trainer
from schemas.run import RunConfig


class EnoughError(Exception):
    """All steps that were to be timed are done."""


def main(config: dict[str, Any], folder: str, threads: int, stop: int) -> dict[str, Any]:
    """Seconds since the call at which each step began and ended, CPU seconds of all threads, and
    the peak of memory."""
    torch.set_num_threads(threads)
    steps: list[tuple[float, float]] = []
    train_step = Trainer.train_step

    def timed(trainer: Trainer, batch: Any) -> Any:
        begin = time.perf_counter() - start
        result = train_step(trainer, batch)
        steps.append((begin, time.perf_counter() - start))
        if len(steps) == stop:
            raise EnoughError
        return result

    Trainer.train_step = timed  # type: ignore[method-assign,assignment]
    start, cpu = time.perf_counter(), time.process_time()
    with suppress(EnoughError):
        train_here(RunConfig.model_validate(config), Path(folder))
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return {"steps": steps, "cpu_seconds": time.process_time() - cpu, "peak": peak}


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
