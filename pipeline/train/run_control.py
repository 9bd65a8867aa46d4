"""Requests to a run in training, in an actor of their own.

Imports neither torch nor Ray, which would delay the start of a training and take half a gigabyte.
"""

from __future__ import annotations

import time

ALIVE_SECONDS = 10.0
"""Seconds without a heartbeat after which the main rank counts as not training."""


class RunControl:
    """Actor that carries requests from the driver and Ray's controller to the main rank."""

    def __init__(self) -> None:
        self._stop = False
        self._requested = self._saved = 0
        self._heartbeat = float("-inf")
        self._failure: str | None = None

    def fail(self, message: str) -> None:
        """Report an error of a worker that a restart cannot fix."""
        self._failure = message

    def failure(self) -> str | None:
        return self._failure

    def stop(self) -> None:
        self._stop = True

    def save(self) -> int | None:
        """Request a checkpoint. Returns the request's number, or None if no worker trains."""
        if time.monotonic() - self._heartbeat > ALIVE_SECONDS:
            return None
        self._requested += 1
        return self._requested

    def is_pending(self, number: int) -> bool:
        """True while the request ``number`` of ``save`` is pending and the main rank is alive."""
        return self._saved < number and time.monotonic() - self._heartbeat <= ALIVE_SECONDS

    def heartbeat(self, saved: int) -> tuple[bool, int]:
        """Called by the main rank, which has served save requests up to ``saved``. Returns
        (stop, number of the latest save request)."""
        self._heartbeat = time.monotonic()
        self._saved = max(self._saved, saved)
        return self._stop, self._requested
