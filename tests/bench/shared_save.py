"""Workers that write one checkpoint together, each in a process."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from pipeline.checkpoints import shares
from pipeline.checkpoints.division import part_of
from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.checkpoints.state import CheckpointContents
from pipeline.models import make_student
from schemas.student import StudentConfig


def save_shares(options: Any, count: int, folder: Path) -> tuple[float, float, float]:
    """Seconds until ``count`` workers have published a checkpoint, CPU seconds of the busiest one,
    and bytes of the largest share."""
    student = StudentConfig(model=options.student, depth=options.depth)
    weights = make_student(student).state_dict()
    state = {
        number: {"step": torch.tensor(1.0), "exp_avg": one.clone(), "exp_avg_sq": one.clone()}
        for number, one in enumerate(weights.values())
    }
    average = {name: one.clone() for name, one in weights.items()}
    contents = CheckpointContents({"model": weights, "ema": average}, {"state": state}, {"step": 1})
    context = multiprocessing.get_context("fork")  # the memory of the state is shared
    barrier, found = context.Barrier(count + 1), context.SimpleQueue()
    workers = [
        context.Process(target=_save, args=(contents, rank, count, folder, barrier, found))
        for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    begin = time.perf_counter()
    published, cpu, sizes = zip(*(found.get() for _ in workers), strict=True)
    for worker in workers:
        worker.join()
    shutil.rmtree(folder / "run")
    return max(published) - begin, max(cpu), max(sizes)


def _save(
    contents: CheckpointContents, rank: int, count: int, folder: Path, barrier: Any, found: Any
) -> None:
    """``perf_counter`` is one clock for all processes."""
    torch.set_num_threads(1)
    group: Any = SimpleNamespace(
        rank=rank, world_size=count, is_main=rank == 0, broadcast_int=lambda _: 1
    )
    with patch.object(shares, "MIN_BYTES", 1):
        part = part_of(contents, group)
    barrier.wait()
    cpu = time.process_time()
    LocalCheckpoints(folder / "run", keep=1).save(1, part)
    end, cpu = time.perf_counter(), time.process_time() - cpu
    tensors = [one for each in part.weights.values() for one in each.values()]
    tensors += [one for each in part.optimizer["state"].values() for one in each.values()]
    found.put((end, cpu, sum(one.nbytes for one in tensors)))
