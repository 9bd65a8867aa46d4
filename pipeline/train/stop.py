"""Asking a run to save or to stop, and all its workers agreeing on the step at which they do."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from enum import IntEnum
from types import FrameType
from typing import Any

import torch

from pipeline.train.parallel import Parallel


class Wish(IntEnum):
    """What somebody outside of the run asks for."""

    GO_ON = 0
    SAVE = 1
    """Write a checkpoint at the next step boundary and go on."""
    STOP = 2
    """Write a checkpoint at the next step boundary and end."""


Ask = Callable[[], Wish]
"""Called at every step boundary, and now and then within long pauses; must not wait."""


def nothing_asked() -> Wish:
    return Wish.GO_ON


class StopSignals:
    """While entered, SIGTERM (a spot notice, Slurm, Kubernetes) and Ctrl-C are wishes to stop.

    A second Ctrl-C interrupts at once. Signals can be had in the main thread alone: elsewhere
    nothing is ever received.
    """

    def __init__(self, promise: str | None = "stopping after a checkpoint") -> None:
        """``promise`` is said at once on stderr: what will follow, where that takes a while."""
        self.promise = promise
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> Wish:
        return Wish.GO_ON if self.received is None else Wish.STOP

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that ended because of the signal."""
        return 128 + (self.received or signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            if self.promise is not None:
                # not print(), which the signal may have interrupted
                os.write(2, f"{self.received.name}: {self.promise}\n".encode())
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])


class Agreement:
    """What all ranks do at a step boundary, whichever of them was asked.

    They vote at every boundary and act on the vote of the one before: by then it has been counted,
    so that no device is waited for. One tiny reduction per step is what that costs.
    """

    def __init__(self, parallel: Parallel, ask: Ask) -> None:
        self.parallel = parallel
        self.ask = ask
        self._pending: torch.Tensor | None = None
        self._counted: torch.cuda.Event | None = None

    def at_boundary(self) -> Wish:
        """Every rank calls it before each step, and equally often between two steps."""
        if self.parallel.world_size == 1:
            return self.ask()
        wish = self._last_vote()
        self._vote(self.ask())
        return wish

    def forget(self) -> None:
        """Drop the vote that is under way: what it wished for has just been done."""
        self._last_vote()

    def _vote(self, wish: Wish) -> None:
        votes = torch.zeros(len(Wish), device=self.parallel.device)
        votes[int(wish)].fill_(1)
        self._pending = self.parallel.sum(votes)
        if votes.is_cuda:
            host = torch.empty(len(Wish), pin_memory=True)
            self._pending = host.copy_(votes, non_blocking=True)
            self._counted = torch.cuda.Event()
            self._counted.record()

    def _last_vote(self) -> Wish:
        if self._pending is None:
            return Wish.GO_ON
        if self._counted is not None:
            self._counted.synchronize()
        votes, self._pending, self._counted = self._pending.tolist(), None, None
        return max(wish for wish in Wish if votes[wish])
