"""A command that is restarted whenever it fails, as a user or a scheduler would."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO

from tests.faults.environments import ROOT
from tests.faults.timeouts import RunFailedError, wait_for
from tests.faults.workloads import Workload

MAX_STARTS = 12


class SupervisedCommand:
    """The command of a workload. A context manager: leaving it kills the command."""

    def __init__(self, work: Workload, variables: Mapping[str, str], log: IO[bytes]) -> None:
        self.work = work
        self.variables = variables
        self.log = log
        self.starts = 0
        self.before_restart: Callable[[], object] = lambda: None
        """Called before the command is restarted."""

    def __enter__(self) -> SupervisedCommand:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.starts:
            self.process.kill()
            self.process.wait()

    def start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        self.log.write(f"== start {self.starts}\n".encode())
        self.log.flush()
        self.process = subprocess.Popen(
            self.work.command(),
            cwd=ROOT,
            env=dict(self.variables),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        return self.process

    @property
    def done(self) -> bool:
        """True once the command has exited with code 0."""
        return self.process.poll() == 0

    def wait(self, happened: Callable[[], bool], seconds: float, event: str) -> None:
        """Wait until ``happened()`` or the work is done, and restart failed commands. Raises
        ``RunFailedError``."""

        def finished() -> bool:
            if self.process.poll() not in (None, 0):
                if self.starts >= MAX_STARTS:
                    raise RunFailedError(f"{event}: the command failed {self.starts} times")
                self.before_restart()
                self.start()
            return self.done or happened()

        wait_for(finished, seconds, event)
