"""Every wait of the harness: it has a limit, and a message for when that is reached."""

from __future__ import annotations

import time
from collections.abc import Callable

START_SECONDS = 150.0
"""From a command to its first progress."""
PROGRESS_SECONDS = 180.0
"""From a fault to progress beyond what there was."""
END_SECONDS = 180.0
"""From the last fault to the end of the work; and of one question asked afterwards."""
EXIT_SECONDS = 60.0
"""From a SIGTERM to the end of the process."""
SETTLE_SECONDS = 1.0
"""After a fault, before progress counts as that of a run that has recovered."""
POLL_SECONDS = 0.02


class BrokenError(Exception):
    """A run that cannot be brought to its end."""


class AbandonedError(Exception):
    """The harness itself could not go on with a run: it says nothing and is drawn again."""


class HungError(BrokenError):
    """Something did not happen within its limit."""


def wait_for(happened: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait until ``happened()``; returns for how long. Raises ``HungError`` naming ``what``."""
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > seconds:
            raise HungError(f"{what}: still not after {seconds:.0f} s")
        time.sleep(POLL_SECONDS)
    return time.monotonic() - began
