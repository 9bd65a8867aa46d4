"""Timeouts of the harness, its errors, and the one function that waits."""

from __future__ import annotations

import time
from collections.abc import Callable

START_SECONDS = 150.0
"""From a command to its first progress."""
PROGRESS_SECONDS = 180.0
"""From a fault to progress beyond that before it."""
END_SECONDS = 180.0
"""From the last fault to the end of the work; also for one inspection afterwards."""
EXIT_SECONDS = 60.0
"""From a SIGTERM to the end of the process."""
SETTLE_SECONDS = 1.0
"""After a fault, until progress counts as recovery."""
POLL_SECONDS = 0.02


class RunFailedError(Exception):
    """A run that cannot be completed."""


class HarnessError(Exception):
    """A failure of the harness itself: the run has no results and is repeated."""


class WaitTimeoutError(RunFailedError):
    """An event did not happen within its timeout."""


def wait_for(happened: Callable[[], bool], seconds: float, event: str) -> float:
    """Poll ``happened`` until it is true; returns the seconds waited. Raises ``WaitTimeoutError``
    naming ``event``."""
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > seconds:
            raise WaitTimeoutError(f"{event}: not after {seconds:.0f} s")
        time.sleep(POLL_SECONDS)
    return time.monotonic() - began
