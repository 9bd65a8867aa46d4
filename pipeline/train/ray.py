"""The thin adapter between the training core and Ray Train."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import Checkpoint, FailureConfig, ScalingConfig, WorkerGroupError
from ray.train import CheckpointConfig as RayCheckpointConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline.cluster import require, total
from pipeline.files import absolute_url, open_url
from pipeline.train.folder import RunFolder
from pipeline.train.loop import train
from pipeline.train.parallel import Parallel
from schemas.errors import UserError
from schemas.run import RunConfig


def fit(config: RunConfig) -> None:
    """Train on a connected Ray cluster; a run of the same name and output continues.

    Raises ``UserError`` where the cluster cannot hold the workers, Ray's own errors where training
    failed more often than ``workers.max_failures``.
    """
    workers = config.workers
    gpus = workers.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if total("GPU") else 0.0
    if gpus:
        require("GPU", gpus, workers.count, option="--workers.gpus-per-worker")
    require("CPU", workers.cpus_per_worker, workers.count, option="--workers.count")
    storage_path, storage_filesystem = _storage(config)
    resources = {"CPU": workers.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json")},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count, use_gpu=bool(gpus), resources_per_worker=resources
        ),
        run_config=RayRunConfig(
            name=config.name,
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            checkpoint_config=RayCheckpointConfig(num_to_keep=config.checkpoint.keep),
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause = getattr(failure, "cause", failure)
            if isinstance(cause, UserError):
                raise cause from None
        raise


def _storage(config: RunConfig) -> tuple[str, Any]:
    """Ray's path and pyarrow filesystem of the output folder; remote ones through fsspec, so that
    they see the credentials and endpoint that the store sees."""
    output = absolute_url(config.output)
    if "://" not in output:
        return output, None
    filesystem, root = open_url(output, what="--output")
    return root, PyFileSystem(FSSpecHandler(filesystem))


def _worker(arguments: dict[str, Any]) -> None:
    config = RunConfig.model_validate(arguments["config"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.workers.cpus_per_worker)))
    parallel = Parallel(context.get_world_rank(), context.get_world_size(), device)
    newest = ray.train.get_checkpoint()
    at_newest = newest.as_directory() if newest else nullcontext()
    with at_newest as resume, RunFolder(config, owner=parallel.is_first) as folder:
        train(
            config,
            folder.path,
            _reporter(parallel, folder),
            parallel=parallel,
            resume=Path(resume) if resume else None,
        )


def _reporter(parallel: Parallel, run: RunFolder) -> Callable[[int, Callable[[Path], None]], None]:
    def save(step: int, write: Callable[[Path], None]) -> None:
        """Every rank reports (it is a barrier), the first with the checkpoint."""
        with tempfile.TemporaryDirectory(prefix="haste-checkpoint-") as folder:
            checkpoint = None
            if parallel.is_first:
                write(Path(folder))
                checkpoint = Checkpoint.from_directory(folder)
                run.publish()
            ray.train.report(
                {"step": step},
                checkpoint=checkpoint,
                checkpoint_dir_name=f"checkpoint-{step:09d}",
            )

    return save
