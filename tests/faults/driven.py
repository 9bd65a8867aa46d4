"""A command that is run again whenever it dies, as a person or a scheduler would."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO

from tests.faults.habitats import ROOT
from tests.faults.limits import BrokenError, wait_for
from tests.faults.work import Work

MAX_STARTS = 12


class Driven:
    """The command of one piece of work. A context: leaving it kills the command."""

    def __init__(self, work: Work, environment: Mapping[str, str], log: IO[bytes]) -> None:
        self.work = work
        self.environment = environment
        self.log = log
        self.starts = 0
        self.before_again: Callable[[], object] = lambda: None
        """Called before the command is run again."""

    def __enter__(self) -> Driven:
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
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        return self.process

    @property
    def done(self) -> bool:
        """Whether the command has ended well."""
        return self.process.poll() == 0

    def wait(self, happened: Callable[[], bool], seconds: float, what: str) -> None:
        """Until ``happened()`` or the work is done. Raises
        ``BrokenError``."""

        def over() -> bool:
            if self.process.poll() not in (None, 0):
                if self.starts >= MAX_STARTS:
                    raise BrokenError(f"{what}: the command failed {self.starts} times")
                self.before_again()
                self.start()
            return self.done or happened()

        wait_for(over, seconds, what)
