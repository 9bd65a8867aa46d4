"""The thin adapter between the training core and Ray Train.

Ray places, connects and restarts the workers. It keeps no checkpoints: a report to its controller
counts only once that has polled, so that a kill right after one would go on from an older step. A
worker group takes the newest whole checkpoint that lies in the run's folder instead, which is where
the first worker itself has put it.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillRunning
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.exceptions import RayError
from ray.train import FailureConfig, ScalingConfig, WorkerGroupError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.checkpoints.selection import Checkpoints, Write, latest_valid
from pipeline.distributed.log_relay import set_up_worker_logging
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.ray_cluster import require, total
from pipeline.distributed.signals import StopRequest, StopSignals, no_request
from pipeline.runs.directory import RunFolder
from pipeline.storage.files import StorageError, absolute_url, open_url
from pipeline.train.loop import SaveCheckpoint, train
from schemas.errors import StoppedError, UserError
from schemas.run import RunConfig

POLL_SECONDS = 1.0
"""Between two looks of the first worker at what is asked of the run."""
ALIVE_SECONDS = 10.0
"""A first worker that has not looked for so long is not training."""
RESIZE_SECONDS = 600.0
"""How long a worker group that is to be replaced by a larger one may take to save."""


class RunControl:
    """What is asked of a run: an actor, where the driver and Ray's controller leave word."""

    def __init__(self) -> None:
        self._stop = False
        self._asked = self._saved = 0
        self._looked = float("-inf")
        self._failure: str | None = None

    def fail(self, message: str) -> None:
        """A worker met what no restart will change."""
        self._failure = message

    def failure(self) -> str | None:
        return self._failure

    def stop(self) -> None:
        self._stop = True

    def save(self) -> int | None:
        """Ask for a checkpoint. Returns the order's number, or None where nobody trains."""
        if time.monotonic() - self._looked > ALIVE_SECONDS:
            return None
        self._asked += 1
        return self._asked

    def is_open(self, order: int) -> bool:
        """Whether an order of ``save`` can still be expected to be carried out."""
        return self._saved < order and time.monotonic() - self._looked <= ALIVE_SECONDS

    def look(self, saved: int) -> tuple[bool, int]:
        """Called by the first worker, which has carried out the orders up to ``saved``: whether to
        stop, and the newest order to save."""
        self._looked = time.monotonic()
        self._saved = max(self._saved, saved)
        return self._stop, self._asked


class CheckpointBeforeResize(ControllerCallback):
    """In Ray's controller: save before an elastic group is replaced by one of another size, which
    Ray does without warning it, and as soon as a node's end is announced."""

    def __init__(self, orders: Any) -> None:
        self.orders = orders

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        before, name = type(previous_state).__name__, type(current_state).__name__
        if name == before or name not in ("ResizingState", "PreemptingState"):
            return
        try:
            order = ray.get(self.orders.save.remote())
            if name == "PreemptingState" or order is None:
                return  # the group goes on training until its node has gone
            deadline = time.monotonic() + RESIZE_SECONDS
            while time.monotonic() < deadline and ray.get(self.orders.is_open.remote(order)):
                time.sleep(0.2)
        except RayError:
            return  # the actor is gone, and with it the driver


class ControlPoller:
    """What is asked of the run, as the first worker knows it: a thread looks now and then."""

    def __init__(self, orders: Any) -> None:
        self.orders = orders
        self._asked = self._saved = 0
        self._stop = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)
        self._thread.start()

    def __call__(self) -> StopRequest:
        if self._stop:
            return StopRequest.STOP
        return StopRequest.SAVE if self._asked > self._saved else StopRequest.GO_ON

    def saved(self, asked: int) -> None:
        """A checkpoint was written that began when ``asked`` orders had come."""
        self._saved = asked

    @property
    def asked(self) -> int:
        return self._asked

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            try:
                self._stop, self._asked = ray.get(self.orders.look.remote(self._saved))
            except RayError:
                return  # the driver has gone: Ray ends this process too


def fit(config: RunConfig) -> None:
    """Train on a connected Ray cluster; a run of the same name and output continues.

    Raises ``UserError`` where the cluster cannot hold the workers, ``StoppedError`` after SIGTERM
    or Ctrl-C, Ray's own errors where training failed more often than ``workers.max_failures``.
    """
    workers = config.workers
    gpus = workers.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if total("GPU") else 0.0
    fewest = workers.min_count or workers.count
    option = "--workers.min-count" if workers.min_count else "--workers.count"
    if gpus:
        require("GPU", gpus, fewest, option="--workers.gpus-per-worker")
    require("CPU", workers.cpus_per_worker, fewest, option=option)
    storage_path, storage_filesystem = _storage(config)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    orders = ray.remote(RunControl).options(num_cpus=0, scheduling_strategy=here).remote()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json"), "orders": orders},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=scaling(config, gpus),
        run_config=RayRunConfig(
            name=config.name,
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            callbacks=[CheckpointBeforeResize(orders)],
        ),
    )
    with StopSignals() as signals:
        try:
            result = _fit_and_watch(trainer, orders, signals)
        except WorkerGroupError as error:
            for failure in error.worker_failures.values():
                cause = getattr(failure, "cause", failure)
                if isinstance(cause, UserError):
                    raise cause from None
            raise
        if result.return_value is not None:
            raise StoppedError(str(result.return_value), signals.exit_code)


def scaling(config: RunConfig, gpus: float) -> ScalingConfig:
    """How many workers Ray starts, and what each of them reserves."""
    workers = config.workers
    elastic = workers.min_count is not None and workers.min_count < workers.count
    return ScalingConfig(
        num_workers=(workers.min_count, workers.count) if elastic else workers.count,
        use_gpu=bool(gpus),
        resources_per_worker={"CPU": workers.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
    )


def _fit_and_watch(trainer: TorchTrainer, orders: Any, signals: StopSignals) -> ray.train.Result:
    """``trainer.fit()`` in a thread (in the main one Ray would take Ctrl-C for itself, and abort),
    while this one waits for signals, and for errors that Ray would only meet again after each of
    ``workers.max_failures`` restarts."""
    future: Future[ray.train.Result] = Future()

    def run() -> None:
        try:
            future.set_result(trainer.fit())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    told = False
    looked = time.monotonic()
    while True:
        try:
            return future.result(timeout=0.2)
        except StillRunning:
            if future.done():
                raise
        if time.monotonic() - looked > POLL_SECONDS:
            looked = time.monotonic()
            failure = ray.get(orders.failure.remote())
            if failure is not None:
                raise UserError(failure)
        if signals.received is not None and not told:
            orders.stop.remote()
            told = True


def _storage(config: RunConfig) -> tuple[str, Any]:
    """Ray's path and pyarrow filesystem of the output folder; remote ones through fsspec, so that
    they see the credentials and endpoint that the store sees."""
    output = absolute_url(config.output)
    if "://" not in output:
        return output, None
    filesystem, root = open_url(output, what="--output")
    return root, PyFileSystem(FSSpecHandler(filesystem))


def _worker(arguments: dict[str, Any]) -> str | None:
    """Returns the message of a run that was asked to stop."""
    set_up_worker_logging()
    config = RunConfig.model_validate(arguments["config"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.workers.cpus_per_worker)))
    parallel = ProcessGroup(context.get_world_rank(), context.get_world_size(), device)
    lookout = ControlPoller(arguments["orders"]) if parallel.is_main else None
    try:
        with RunFolder(config, owner=parallel.is_main) as folder:
            folder.require_shared()
            train(
                config,
                folder.path,
                _saver(folder, lookout),
                parallel=parallel,
                resume=_newest(folder.checkpoints, parallel, context.get_local_rank()),
                ask=lookout or no_request,
            )
    except StoppedError as stop:
        return str(stop)
    except StorageError:
        raise  # it may have come back by the time the workers have
    except UserError as error:
        ray.get(arguments["orders"].fail.remote(str(error)))
        raise
    finally:
        if lookout is not None:
            lookout.close()
    return None


def _saver(run: RunFolder, lookout: ControlPoller | None) -> SaveCheckpoint:
    def save(step: int, write: Write) -> None:
        """The others, who have no lookout, go on at once: their next step waits for the first."""
        if lookout is not None:
            asked = lookout.asked
            run.publish()  # before the checkpoint, which counts the rows of the metrics
            run.checkpoints.save(step, write)
            lookout.saved(asked)

    return save


@contextmanager
def _newest(
    checkpoints: Checkpoints, parallel: ProcessGroup, local_rank: int
) -> Iterator[Path | None]:
    """The newest whole checkpoint, the same for all workers: the first one decides. Where it lies
    far away, one worker of each node fetches it for all of them."""
    scratch = Path(tempfile.gettempdir())
    scratch /= f"haste-checkpoint-{parallel.broadcast_int(random.getrandbits(48))}"
    found = latest_valid(checkpoints, scratch) if parallel.is_main else None
    step = parallel.broadcast_int(-1 if found is None else found[0])
    if step < 0:
        yield None
        return
    if local_rank == 0 and not parallel.is_main:
        checkpoints.fetch(step, scratch)
    try:
        parallel.broadcast_int(0)  # until all have fetched
        yield checkpoints.fetch(step, scratch)
        parallel.broadcast_int(0)  # until all have read
    finally:
        if local_rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
