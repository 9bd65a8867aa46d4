"""Trying again while storage is away, and one clear line where it stays away."""

from __future__ import annotations

import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.storage.errors import Fault, fault_of, reason_of, suggest_fix
from pipeline.storage.redaction import redact
from schemas.errors import UserError

T = TypeVar("T")

RETRY_SECONDS = 120.0
"""How long one operation is tried before it fails, in seconds."""

RETRY_VARIABLE = "HASTE_STORAGE_RETRY_SECONDS"
"""Environment variable with another limit, because it must reach the workers of a cluster, and a
run's config would carry the operator's patience into its record. Changes no number of a run."""

FIRST_DELAY = 0.25
MAX_DELAY = 5.0

_jitter = random.Random()  # its own state: that of `random` belongs to whoever seeds it
_unwanted: ContextVar[threading.Event | None] = ContextVar("_unwanted", default=None)
"""Set when nobody waits any more for what this thread asks of storage."""


class StorageError(UserError):
    """Storage could not be used. One line: what, where, why, for how long, and what to do."""


def retry_limit() -> float:
    """Seconds after which an operation is given up. Raises ``UserError`` where the environment
    asks for what is no number of seconds."""
    text = os.environ.get(RETRY_VARIABLE, "")
    try:
        seconds = float(text) if text else RETRY_SECONDS
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{RETRY_VARIABLE}='{text}': give a number of seconds, 0 or more")
    return seconds


@contextmanager
def cancel_when(event: threading.Event) -> Iterator[None]:
    """What this thread asks of storage inside is not tried, or tried again, once ``event`` is set:
    it raises ``CancelledError`` instead, at once where it waits for its next attempt."""
    token = _unwanted.set(event)
    try:
        yield
    finally:
        _unwanted.reset(token)


def retrying(
    call: Callable[[], T], filesystem: fsspec.AbstractFileSystem, path: str, *, doing: str
) -> T:
    """``call()``, again and again with growing pauses while it fails in ways that may pass.

    ``doing`` is a verb for messages ("read"). ``call`` must be safe to repeat. Raises
    ``FileNotFoundError`` as it comes and ``StorageError`` for whatever else storage refuses: at
    once where trying again is pointless, otherwise when the limit is reached. Raises
    ``CancelledError`` rather than try again what nobody wants any more (``cancel_when``).
    """
    limit = retry_limit()
    start = time.monotonic()
    attempts = 0
    while True:
        if _is_unwanted():
            raise CancelledError
        attempts += 1
        try:
            result = call()
        except Exception as error:
            fault = fault_of(error)
            what = f"cannot {doing} '{shown(filesystem, path)}': {reason_of(error)}"
            if fault in (Fault.MISSING, Fault.NOT_STORAGE):
                raise
            if fault is Fault.PERMANENT:
                raise StorageError(f"{what}; {suggest_fix(error)}") from None
            elapsed = time.monotonic() - start
            if elapsed >= limit:
                raise StorageError(
                    f"{what}; gave up after {elapsed:.0f} s and {attempts} attempts: check that "
                    "the storage is up and its endpoint is right, then run the same command again"
                ) from None
            if attempts == 1:
                _note(f"{what}; trying again for up to {limit:.0f} s")
        else:
            if attempts > 1:
                elapsed = time.monotonic() - start
                _note(
                    f"storage is back: could {doing} '{shown(filesystem, path)}' after "
                    f"{elapsed:.1f} s and {attempts} attempts"
                )
            return result
        _wait(min(_pause(attempts), max(0.0, limit - elapsed)))


def shown(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    """The path as a person would write it, without credentials."""
    if isinstance(filesystem, LocalFileSystem):
        return path
    return redact(str(filesystem.unstrip_protocol(path)))


def _pause(attempts: int) -> float:
    """Seconds to wait: doubling, and random so that many workers do not come back at once."""
    return float(min(MAX_DELAY, FIRST_DELAY * 2.0 ** (attempts - 1)) * _jitter.uniform(0.5, 1))


def _wait(seconds: float) -> None:
    event = _unwanted.get()
    if event is None:
        time.sleep(seconds)
    else:
        event.wait(seconds)


def _is_unwanted() -> bool:
    event = _unwanted.get()
    return event is not None and event.is_set()


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")
