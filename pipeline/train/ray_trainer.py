"""Adapter between the training core and Ray Train.

Ray places, connects and restarts the workers. It manages no checkpoints, because a report to its
controller counts only once the controller has polled: after a kill in between, a run would resume
from an older step. The main rank writes checkpoints to the run's folder, and every new worker group
resumes from the latest valid one there.
"""

from __future__ import annotations

import atexit
import logging
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillRunning
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train import FailureConfig, ScalingConfig, WorkerGroupError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.checkpoints.integrity import verify
from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.checkpoints.selection import Checkpoints, latest_state, search_latest_valid
from pipeline.checkpoints.state import CheckpointContents, verify_finite
from pipeline.distributed.log_relay import set_up_worker_logging
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.ray_cluster import require, total
from pipeline.distributed.signals import StopRequest, StopSignals, no_request
from pipeline.runs.directory import RunFolder
from pipeline.storage.files import StorageError, absolute_url, open_url
from pipeline.train.ray_metrics import exported_metrics
from pipeline.train.run_control import RunControl
from schemas.errors import StoppedError, UserError, plain_text
from schemas.run import RunConfig

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Seconds between two polls of the main rank for requests."""
RESIZE_SECONDS = 600.0
"""Seconds that a worker group may take to save before it is resized."""
SHUTDOWN_SECONDS = 5.0
"""Seconds that a process waits at its end for the thread of Ray's training."""


class CheckpointBeforeResize(ControllerCallback, WorkerGroupCallback):
    """Callback in Ray's controller that requests a checkpoint before an elastic worker group is
    resized, because Ray ends its workers without notice, and when a node is about to be lost."""

    def __init__(self, control: Any) -> None:
        self.control = control
        self.workers: list[Any] = []
        """Actors of the present group."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        self.workers = [worker.actor for worker in worker_group.get_workers()]

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        before, name = type(previous_state).__name__, type(current_state).__name__
        if name == before or name not in ("ResizingState", "PreemptingState"):
            return
        try:
            number = ray.get(self.control.save.remote())
            if name == "PreemptingState" or number is None:
                return  # the group trains until the node is lost
            deadline = time.monotonic() + RESIZE_SECONDS
            calls = [_call(worker) for worker in self.workers]
            while time.monotonic() < deadline and ray.get(self.control.is_pending.remote(number)):
                time.sleep(0.2)
                for place, worker in enumerate(self.workers):
                    if ray.wait([calls[place]], timeout=0)[0]:
                        ray.get(calls[place])  # raises if the worker has died
                        calls[place] = _call(worker)
        except RayError:
            # The driver has ended, and the actor with it; or a worker was lost since Ray decided to
            # resize: the others wait for it and cannot save, and Ray looks at them afterwards only.
            return


def _call(worker: Any) -> ray.ObjectRef:
    """A call that an actor answers at once. One of a lost node fails once Ray has noticed it."""
    return worker.__ray_call__.remote(lambda _: None)


class ControlPoller:
    """Requests to the run, polled by a thread of the main rank."""

    def __init__(self, control: Any) -> None:
        self.control = control
        self._requested = self._begun = self._saved = 0
        self._stop = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control-poller", daemon=True)
        self._thread.start()

    def __call__(self) -> StopRequest:
        if self._stop:
            return StopRequest.STOP
        done = max(self._begun, self._saved)
        return StopRequest.SAVE if self._requested > done else StopRequest.GO_ON

    def begin(self) -> int:
        """Note that the state of now is being saved, and do not request it again. Returns the
        number to pass to ``saved``."""
        self._begun = self._requested
        return self._begun

    def saved(self, number: int) -> None:
        """Note that a checkpoint was written that serves save requests up to ``number``."""
        self._saved = number

    @property
    def requested(self) -> int:
        """Number of the latest save request."""
        return self._requested

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            try:
                self._stop, self._requested = ray.get(self.control.heartbeat.remote(self._saved))
            except RayError:
                return  # the driver has ended: Ray ends this process too


def fit(config: RunConfig) -> None:
    """Train a config that ``resolve_run`` has checked on a connected Ray cluster; a run of the same
    name and output continues.

    Raises ``UserError`` where the cluster cannot hold the workers or they died more often than
    ``workers.max_failures``, ``StoppedError`` after SIGTERM or Ctrl-C, Ray's own errors where the
    training itself failed.
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
    control = ray.remote(RunControl).options(num_cpus=0, scheduling_strategy=here).remote()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json"), "control": control},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=scaling(config, gpus),
        run_config=RayRunConfig(
            name=config.name,
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            callbacks=[CheckpointBeforeResize(control)],
        ),
    )
    logger.info("starting %d workers, which load torch and the student", workers.count)
    with StopSignals() as signals:
        try:
            result = _fit_and_watch(trainer, control, signals)
        except WorkerGroupError as error:
            for failure in error.worker_failures.values():
                cause = getattr(failure, "cause", failure)
                if isinstance(cause, UserError):
                    raise cause from None
            death = describe_death(error, workers.max_failures)
            if death is not None:
                raise UserError(death) from None
            raise
        if result.return_value is not None:
            raise StoppedError(str(result.return_value), signals.exit_code)


def describe_death(error: WorkerGroupError, max_failures: int) -> str | None:
    """One line about a worker whose process was ended, for instance for its memory; None where the
    training raised the error. Other workers then miss their connection to it, which says less."""
    for rank, failure in error.worker_failures.items():
        cause = getattr(failure, "health_check_failure", None)
        if isinstance(cause, (RayActorError, OutOfMemoryError)):
            text = plain_text(str(cause))
            reason = text.partition("The actor is dead because ")[2] or text
            return (
                f"worker {rank} died, and --workers.max-failures {max_failures} allows no more "
                "restarts; the same command continues at the latest checkpoint. Where the memory "
                "of the node, of Slurm's --mem or of the pod is used up, processes are killed. "
                f"Ray's reason: {reason[:300]}"
            )
    return None


def scaling(config: RunConfig, gpus: float) -> ScalingConfig:
    """Number of workers that Ray starts, and the resources that each reserves."""
    workers = config.workers
    elastic = workers.min_count is not None and workers.min_count < workers.count
    return ScalingConfig(
        num_workers=(workers.min_count, workers.count) if elastic else workers.count,
        use_gpu=bool(gpus),
        resources_per_worker={"CPU": workers.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
    )


def _fit_and_watch(trainer: TorchTrainer, control: Any, signals: StopSignals) -> ray.train.Result:
    """Run ``trainer.fit()`` in a thread (in the main thread, Ray would handle Ctrl-C and abort).

    This thread waits for signals, and for errors that every restart would meet again.
    """
    future: Future[ray.train.Result] = Future()

    def run() -> None:
        try:
            future.set_result(trainer.fit())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    stop_sent = False
    polled = time.monotonic()
    while True:
        try:
            return future.result(timeout=0.2)
        except StillRunning:
            if future.done():
                raise
        if time.monotonic() - polled > POLL_SECONDS:
            polled = time.monotonic()
            failure = ray.get(control.failure.remote())
            if failure is not None:
                # C++ code that is still running when the interpreter ends aborts the process
                atexit.register(thread.join, SHUTDOWN_SECONDS)
                raise UserError(failure)
        if signals.received is not None and not stop_sent:
            control.stop.remote()
            stop_sent = True


def _storage(config: RunConfig) -> tuple[str, Any]:
    """Ray's path and pyarrow filesystem of the output folder.

    Remote ones go through fsspec, so that they use the same credentials and endpoint as the store.
    """
    output = absolute_url(config.output)
    if "://" not in output:
        return output, None
    filesystem, root = open_url(output, what="--output")
    return root, PyFileSystem(FSSpecHandler(filesystem))


def _worker(arguments: dict[str, Any]) -> str | None:
    """The training function of each worker. Returns the message of a run that was stopped."""
    # here, because the driver and Ray's controller would import it for seconds without use
    from pipeline.train.loop import run_training

    set_up_worker_logging()
    config = RunConfig.model_validate(arguments["config"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.workers.cpus_per_worker)))
    group = ProcessGroup(context.get_world_rank(), context.get_world_size(), device)
    poller = ControlPoller(arguments["control"]) if group.is_main else None
    try:
        metrics = exported_metrics(config.name) if group.is_main else nullcontext()
        with RunFolder(config, owner=group.is_main) as folder, metrics:
            folder.require_shared()
            saver = _Saver(folder, poller)
            run_training(
                config,
                folder.path,
                saver,
                _latest(folder.checkpoints, group, context.get_local_rank()),
                group=group,
                resumes=_resumes(folder.checkpoints, group),
                poll=poller or no_request,
                before_save=saver.begin,
            )
    except StoppedError as stop:
        return str(stop)
    except StorageError:
        raise  # a restart may find the storage available again
    except UserError as error:
        ray.get(arguments["control"].fail.remote(str(error)))
        raise
    finally:
        if poller is not None:
            poller.close()
    return None


class _Saver:
    """Saves on the main rank, which alone has a poller, and on others that have a share."""

    def __init__(self, run: RunFolder, poller: ControlPoller | None) -> None:
        self.run = run
        self.poller = poller
        self._request = 0

    def begin(self) -> None:
        """At the step of a checkpoint: publish the rows of the metrics that it counts. The files
        are written by the training: a thread might meet one half-written."""
        if self.poller is not None:
            self._request = self.poller.begin()
            self.run.publish()

    def __call__(self, step: int, contents: CheckpointContents) -> None:
        """A request counts as served when the checkpoint is published."""
        if self.poller is not None or contents.share is not None:
            self.run.checkpoints.save(step, contents)
        if self.poller is not None:
            self.poller.saved(self._request)


def _latest(
    checkpoints: Checkpoints, group: ProcessGroup, local_rank: int
) -> AbstractContextManager[Path | None]:
    """The latest valid checkpoint, chosen and verified by the main rank for all workers. A local
    one is verified from now on, while the run is built. A remote one is fetched, and verified, by
    one worker of each node, when the context is entered, because it is deleted at its end."""
    search = None
    if group.is_main and isinstance(checkpoints, LocalCheckpoints):  # which are not copied
        search = search_latest_valid(checkpoints, checkpoints.folder, verify_finite)
    return _fetched(search, checkpoints, group, local_rank)


def _resumes(checkpoints: Checkpoints, group: ProcessGroup) -> bool:
    """If ``_latest`` will give a checkpoint, or raise an error, on every rank."""
    return bool(group.broadcast_int(group.is_main and latest_state(checkpoints) is not None))


@contextmanager
def _fetched(
    search: Future[tuple[int, Path] | None] | None,
    checkpoints: Checkpoints,
    group: ProcessGroup,
    local_rank: int,
) -> Iterator[Path | None]:
    scratch = Path(tempfile.gettempdir())
    scratch /= f"haste-checkpoint-{group.broadcast_int(random.getrandbits(48))}"
    found = None
    if group.is_main:
        search = search or search_latest_valid(checkpoints, scratch, verify_finite)
        found = search.result()
    step = group.broadcast_int(-1 if found is None else found[0])
    if step < 0:
        yield None
        return
    if local_rank == 0 and not group.is_main:
        copy = checkpoints.fetch(step, scratch)
        if copy.is_relative_to(scratch):
            verify(copy)
    try:
        group.broadcast_int(0)  # until all nodes have fetched
        yield checkpoints.fetch(step, scratch)
        group.broadcast_int(0)  # until all ranks have read
    finally:
        if local_rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
