"""Where a disturbed run lives: what is around it that can break."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from tests.faults.limits import AbandonedError
from tests.faults.processes import MARK
from tests.s3 import SeaweedFS

ROOT = Path(__file__).parents[2]
NODE_SECONDS = 90.0
DISK_MEGABYTES = 96


class Habitat:
    """A folder of this machine's disk, and a private Ray cluster for each command. A context."""

    name = "disk"

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = dict(environment)
        """Of the commands."""
        self.url = str(folder / "work")
        """Where they write."""
        self.address: str | None = None
        """Of a Ray cluster that they join."""
        self.stack = ExitStack()

    def __enter__(self) -> Habitat:
        Path(self.url).mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stack.close()


class Bucket(Habitat):
    """A bucket of a server that can go away."""

    name = "bucket"

    def __enter__(self) -> Habitat:
        self.server = self.stack.enter_context(SeaweedFS())
        self.environment |= self.server.environment
        self.url = self.server.bucket()
        return self


class SmallDisk(Habitat):
    """A disk that can be filled: a tmpfs."""

    name = "small disk"

    def __enter__(self) -> Habitat:
        super().__enter__()
        try:
            mount(Path(self.url))
        except OSError as error:
            raise AbandonedError(f"no tmpfs: {error}") from None
        self.stack.callback(unmount, Path(self.url))
        self.url = f"{self.url}/inside"  # the ballast lies beside it
        Path(self.url).mkdir()
        return self

    @property
    def ballast(self) -> Path:
        return Path(self.url).parent / "ballast"

    def fill(self, left: int) -> None:
        """Leave so many bytes free, and a page at most more."""
        with self.ballast.open("wb", buffering=0) as file:
            block = bytes(1 << 20)
            try:
                while True:
                    file.write(block)
            except OSError:
                file.truncate(max(0, file.tell() - left))

    def make_room(self) -> None:
        self.ballast.unlink(missing_ok=True)


class Nodes(Habitat):
    """A Ray cluster of two nodes; the second one can be lost, and another one comes."""

    name = "two nodes"

    def __enter__(self) -> Habitat:
        super().__enter__()
        self._lines: queue.Queue[str] = queue.Queue()
        self._log = self.stack.enter_context((self.folder / "nodes.log").open("w"))
        self._cluster = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nodes"],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.stack.callback(self._cluster.wait)
        self.stack.callback(self._cluster.kill)  # whoever ends the run ends what it has started
        threading.Thread(target=self._listen, daemon=True).start()
        self._await_node()
        return self

    def replace(self) -> None:
        """Another second node comes up."""
        assert self._cluster.stdin is not None
        self._cluster.stdin.write("another\n")
        self._cluster.stdin.flush()
        self._await_node()

    def _listen(self) -> None:
        assert self._cluster.stdout is not None
        for line in self._cluster.stdout:
            self._lines.put(line)

    def _await_node(self) -> None:
        while True:
            try:
                line = self._lines.get(timeout=NODE_SECONDS)
            except queue.Empty:
                limit = f"{NODE_SECONDS:.0f} s"
                raise AbandonedError(f"a Ray node: still not up after {limit}") from None
            if line.startswith("{"):
                about = json.loads(line)
                self.address, self.raylet = about["address"], int(about["raylet"])
                return


HABITATS: dict[str, type[Habitat]] = {h.name: h for h in (Habitat, Bucket, SmallDisk, Nodes)}


def mount(folder: Path) -> None:
    """A tmpfs at an empty folder. Raises ``OSError`` where this machine does not allow that."""
    size = f"size={DISK_MEGABYTES}m"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "haste-faults", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise OSError(done.stderr.strip())


def unmount(folder: Path) -> None:
    """Also where a process that is being killed still has files open there."""
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def environment_of(mark: str, folder: Path, ray_folder: Path) -> dict[str, str]:
    """Of every process of a run: the mark, folders of its own, and quick polling."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("AWS_", "RAY_", "PYTEST_"))
    }
    for part in ("home", "tmp"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    return inherited | {
        MARK: mark,
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "RAY_TMPDIR": str(ray_folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "PYTHONUNBUFFERED": "1",
    }
