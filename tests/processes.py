"""Training in several plain processes, as Ray Train would place them, but started in seconds."""

from __future__ import annotations

import multiprocessing
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.train.local import LocalCheckpoints
from pipeline.train.loop import train
from pipeline.train.parallel import Parallel
from schemas.run import RunConfig


def train_on(world_size: int, config: RunConfig, folder: Path, resume: Path | None = None) -> None:
    """Like ``train``, on ``world_size`` processes that talk gloo."""
    if world_size == 1:
        _train(config, folder, resume, Parallel())
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    arguments = (world_size, address, config.model_dump(mode="json"), folder, resume)
    # the server imports torch once, and each process is a fork of it
    multiprocessing.set_forkserver_preload(["tests.processes"])
    mp.start_processes(_process, arguments, nprocs=world_size, start_method="forkserver")


def _process(
    rank: int,
    world_size: int,
    address: str,
    values: dict[str, Any],
    folder: Path,
    resume: Path | None,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=address,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    config = RunConfig.model_validate(values)
    _train(config, folder, resume, Parallel(rank, world_size))
    dist.destroy_process_group()


def _train(config: RunConfig, folder: Path, resume: Path | None, parallel: Parallel) -> None:
    keeper = LocalCheckpoints(folder, keep=config.checkpoint.keep)

    def save(step: int, write: Any) -> None:
        if parallel.is_first:
            keeper.save(step, write)

    train(config, folder, save, parallel=parallel, resume=resume)
