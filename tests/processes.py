"""Training in several processes without Ray, which start within seconds."""

from __future__ import annotations

import gc
import multiprocessing
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.checkpoints import shares
from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.state import read_state
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import StopRequest
from pipeline.train.loop import train
from pipeline.train.trainer import Trainer
from schemas.errors import StoppedError
from schemas.run import RunConfig

PRELOADED = ["tests.processes", "timm", "pytest", "ray.train", "torch.utils.tensorboard"]
"""Modules that the fork server imports, once for all tests of a process. Ray is among them for
tests that import it; none may start or join a cluster in a fork."""
Around = Callable[[int], AbstractContextManager[object]]


def train_on(
    world_size: int,
    config: RunConfig,
    folder: Path,
    stop_at: int | None = None,
    around: Around | None = None,
) -> None:
    """Train on ``world_size`` processes with gloo, from the latest checkpoint on. The last process
    requests a stop before step ``stop_at``. Every rank trains in the context ``around(rank)``."""
    resume = latest_checkpoint(folder)
    if world_size == 1:
        with around(0) if around else nullcontext():
            _train(config, folder, resume, ProcessGroup(), stop_at)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    values = config.model_dump(mode="json")
    arguments = (world_size, address, values, folder, resume, stop_at, around)
    start_processes(_process, world_size, *arguments)


def start_processes(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in ``world_size`` processes, which have imported
    ``PRELOADED``, and wait for them."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    given = (function, *arguments)
    mp.start_processes(_started, given, nprocs=world_size, start_method="forkserver")


def _started(rank: int, function: Callable[..., None], *arguments: Any) -> None:
    gc.freeze()  # a collection would write to, and so copy, all memory shared with the server
    torch.set_num_threads(1)
    function(rank, *arguments)


@contextmanager
def divides(rank: int) -> Iterator[None]:
    """Several workers write each checkpoint together, however small, each in a thread."""
    save = LocalCheckpoints.save

    def checked(self: LocalCheckpoints, step: int, contents: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        save(self, step, contents)

    with (
        patch.object(shares, "MIN_BYTES", 1),
        patch.object(LocalCheckpoints, "save", checked),
    ):
        yield


def _process(
    rank: int,
    world_size: int,
    address: str,
    values: dict[str, Any],
    folder: Path,
    resume: Path | None,
    stop_at: int | None,
    around: Around | None,
) -> None:
    dist.init_process_group(
        "gloo",
        init_method=address,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    config = RunConfig.model_validate(values)
    with around(rank) if around else nullcontext():
        _train(config, folder, resume, ProcessGroup(rank, world_size), stop_at)
    dist.destroy_process_group()


def _train(
    config: RunConfig,
    folder: Path,
    resume: Path | None,
    group: ProcessGroup,
    stop_at: int | None,
) -> None:
    checkpoints = LocalCheckpoints(folder, keep=config.checkpoint.keep)
    step = read_state(resume).step if resume else 0
    train_step = Trainer.train_step

    def save(step: int, contents: Any) -> None:
        if group.is_main or contents.share is not None:
            checkpoints.save(step, contents)

    def poll() -> StopRequest:
        last = group.rank == group.world_size - 1
        stop = last and stop_at is not None and step >= stop_at
        return StopRequest.STOP if stop else StopRequest.GO_ON

    def counted(trainer: Trainer, batch: Any) -> Any:
        nonlocal step
        result = train_step(trainer, batch)
        step = trainer.step
        return result

    with (
        patch.object(Trainer, "train_step", counted),
        nullcontext() if stop_at is None else suppress(StoppedError),
    ):
        train(config, folder, save, group=group, resume=resume, poll=poll)
