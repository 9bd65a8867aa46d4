"""Environments of a disturbed run: disk, S3 bucket, small disk, two-node cluster."""

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

from tests.faults.processes import MARK
from tests.faults.timeouts import HarnessError
from tests.s3 import SeaweedFS

ROOT = Path(__file__).parents[2]
NODE_SECONDS = 90.0
DISK_MEGABYTES = 96


class Environment:
    """A local folder, and a private Ray cluster for each command. A context manager."""

    name = "disk"

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        self.folder = folder
        self.variables = dict(variables)
        """Environment variables of the commands."""
        self.url = str(folder / "work")
        """Folder or bucket that the commands write to."""
        self.address: str | None = None
        """Address of the Ray cluster that the commands join; None: each starts its own."""
        self.stack = ExitStack()

    def __enter__(self) -> Environment:
        Path(self.url).mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stack.close()


class Bucket(Environment):
    """A bucket of an S3 server that can be killed and restarted."""

    name = "bucket"

    def __enter__(self) -> Environment:
        self.server = self.stack.enter_context(SeaweedFS())
        self.variables |= self.server.environment
        self.url = self.server.bucket()
        return self


class SmallDisk(Environment):
    """A tmpfs that can be filled."""

    name = "small disk"

    def __enter__(self) -> Environment:
        super().__enter__()
        try:
            mount(Path(self.url))
        except OSError as error:
            raise HarnessError(f"no tmpfs: {error}") from None
        self.stack.callback(unmount, Path(self.url))
        self.url = f"{self.url}/inside"  # the ballast file is in the parent folder
        Path(self.url).mkdir()
        return self

    @property
    def ballast(self) -> Path:
        return Path(self.url).parent / "ballast"

    def fill(self, left: int) -> None:
        """Write ballast until ``left`` bytes are free, plus at most one page."""
        with self.ballast.open("wb", buffering=0) as file:
            block = bytes(1 << 20)
            try:
                while True:
                    file.write(block)
            except OSError:
                file.truncate(max(0, file.tell() - left))

    def free_space(self) -> None:
        self.ballast.unlink(missing_ok=True)


class Nodes(Environment):
    """A Ray cluster of two nodes; the second one can be killed and replaced."""

    name = "two nodes"

    def __enter__(self) -> Environment:
        super().__enter__()
        self._lines: queue.Queue[str] = queue.Queue()
        self._log = self.stack.enter_context((self.folder / "nodes.log").open("w"))
        self._cluster = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nodes"],
            cwd=ROOT,
            env=self.variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.stack.callback(self._cluster.wait)
        self.stack.callback(self._cluster.kill)  # ``kill_all`` of the run's mark ends its children
        threading.Thread(target=self._listen, daemon=True).start()
        self._await_node()
        return self

    def replace(self) -> None:
        """Start another second node and wait for it."""
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
                raise HarnessError(f"a Ray node did not start within {limit}") from None
            if line.startswith("{"):
                node = json.loads(line)
                self.address, self.raylet = node["address"], int(node["raylet"])
                return


ENVIRONMENTS: dict[str, type[Environment]] = {
    e.name: e for e in (Environment, Bucket, SmallDisk, Nodes)
}


def mount(folder: Path) -> None:
    """Mount a tmpfs at an empty folder. Raises ``OSError`` where that is not permitted."""
    size = f"size={DISK_MEGABYTES}m"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "haste-faults", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise OSError(done.stderr.strip())


def unmount(folder: Path) -> None:
    """Unmount lazily, because a process that is being killed may still have files open."""
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def process_variables(mark: str, folder: Path, ray_folder: Path) -> dict[str, str]:
    """Environment variables of all processes of a run: the mark, private folders, short polling
    intervals."""
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
        "RAY_worker_niceness": "0",
        "PYTHONUNBUFFERED": "1",
    }
