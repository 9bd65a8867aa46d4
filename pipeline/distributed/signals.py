"""Requests to save or to stop a run, and the signals that make them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from enum import IntEnum
from types import FrameType
from typing import Any

from pipeline.cli.interrupts import CONTINUES, Answers, write_stderr


class StopRequest(IntEnum):
    """Request to a run from outside."""

    GO_ON = 0
    SAVE = 1
    """Write a checkpoint at the next step boundary and go on."""
    STOP = 2
    """Write a checkpoint at the next step boundary and end."""


PollRequest = Callable[[], StopRequest]
"""Called at every step boundary and during long pauses; must not block."""


def no_request() -> StopRequest:
    return StopRequest.GO_ON


class StopSignals:
    """Context in which SIGTERM (a spot notice, Slurm, Kubernetes) and Ctrl-C request a stop.

    A second Ctrl-C interrupts at once. Signals are received in the main thread only.
    """

    def __init__(self, promise: str = "stopping after a checkpoint") -> None:
        """``promise`` is written to stderr at the first signal: what will happen next."""
        self.promise = promise
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
            Answers.text = self.promise
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            Answers.text = CONTINUES

    def __call__(self) -> StopRequest:
        return StopRequest.GO_ON if self.received is None else StopRequest.STOP

    @property
    def exit_code(self) -> int:
        """Exit code of a process that ended because of the signal."""
        return 128 + (self.received or signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            if not Answers.by_thread:
                write_stderr(f"{self.received.name}: {self.promise}")
        if not Answers.by_thread:  # the thread ends the process at a second Ctrl-C
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
