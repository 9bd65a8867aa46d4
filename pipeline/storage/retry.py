"""Retries of storage operations, and one line of error when they do not help."""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain, repeat
from typing import NoReturn, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception,
    sleep,
    sleep_using_event,
    stop_after_delay,
    wait_exponential,
)

from pipeline.storage.errors import Fault, fault_of, reason_of, suggest_fix
from pipeline.storage.redaction import redact
from schemas.errors import UserError

T = TypeVar("T")

logger = logging.getLogger(__name__)

RETRY_SECONDS = 120.0
"""Seconds for which one operation is retried before it fails."""

RETRY_VARIABLE = "HASTE_STORAGE_RETRY_SECONDS"
"""Environment variable with another limit. It is not a run's option, because it must reach all
workers of a cluster and changes no number of a run."""

FIRST_DELAY = 0.25
MAX_DELAY = 5.0

_jitter = random.Random()  # not the global generator, whose state belongs to the caller
_cancelled: ContextVar[threading.Event | None] = ContextVar("_cancelled", default=None)
"""Set when the results of this thread's storage operations are not needed any more."""


class StorageError(UserError):
    """A storage operation failed. One line: operation, place, reason, time spent, what to do."""


def retry_limit() -> float:
    """Seconds after which an operation is given up. Raises ``UserError`` where ``RETRY_VARIABLE``
    is not a number of seconds."""
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
    """Cancel this thread's storage operations inside the context once ``event`` is set: no attempt
    begins after that, a pause between attempts ends at once, and ``CancelledError`` is raised."""
    token = _cancelled.set(event)
    try:
        yield
    finally:
        _cancelled.reset(token)


def retrying(
    call: Callable[[], T], filesystem: fsspec.AbstractFileSystem, path: str, *, doing: str
) -> T:
    """``call()``, repeated with growing pauses while it fails with transient errors.

    ``doing`` is a verb for messages ("read"). ``call`` must be safe to repeat. Raises
    ``FileNotFoundError`` unchanged, and ``StorageError`` for other refusals of storage: at once
    where a retry is pointless, otherwise when the limit is reached. Raises ``CancelledError``
    instead of another attempt once the operation is cancelled (``cancel_when``).
    """
    limit = retry_limit()
    start = time.monotonic()
    _raise_if_cancelled()
    try:
        return call()  # without tenacity, which costs 16 microseconds a call
    except Exception as error:
        first_attempt: Callable[[], T] = partial(_raise, error)
    calls = chain([first_attempt], repeat(call))
    operation = f"{doing} '{shown(filesystem, path)}'"
    backoff = wait_exponential(multiplier=FIRST_DELAY, max=MAX_DELAY)

    def attempt() -> T:
        _raise_if_cancelled()
        return next(calls)()

    def pause(state: RetryCallState) -> float:
        """Random, so that many workers do not come back at once."""
        left = limit - (time.monotonic() - start)
        return min(backoff(state) * _jitter.uniform(0.5, 1), max(0.0, left))

    def report(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if error and state.attempt_number == 1:
            reason = reason_of(error)
            logger.warning("cannot %s: %s; trying again for up to %.0f s", operation, reason, limit)

    event = _cancelled.get()
    attempts = Retrying(
        retry=retry_if_exception(lambda error: fault_of(error) is Fault.TRANSIENT),
        wait=pause,
        stop=stop_after_delay(limit - (time.monotonic() - start)),
        sleep=sleep if event is None else sleep_using_event(event),
        before_sleep=report,
    )
    try:
        result = attempts(attempt)
    except RetryError as failure:
        last = failure.last_attempt
        raise StorageError(
            f"cannot {operation}: {reason_of(last.exception() or failure)}; gave up after "
            f"{time.monotonic() - start:.0f} s and {last.attempt_number} attempts: check that the "
            "storage is up and its endpoint is right, then run the same command again"
        ) from None
    except Exception as error:
        if fault_of(error) is not Fault.PERMANENT:
            raise
        raise StorageError(
            f"cannot {operation}: {reason_of(error)}; {suggest_fix(error)}"
        ) from None
    logger.info(
        "storage is back: could %s after %.1f s and %d attempts",
        operation,
        time.monotonic() - start,
        attempts.statistics["attempt_number"],
    )
    return result


def shown(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    """The path as a user would write it, without credentials."""
    if isinstance(filesystem, LocalFileSystem):
        return path
    return redact(str(filesystem.unstrip_protocol(path)))


def _raise(error: Exception) -> NoReturn:
    raise error


def _raise_if_cancelled() -> None:
    event = _cancelled.get()
    if event is not None and event.is_set():
        raise CancelledError
