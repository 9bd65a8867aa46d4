"""Log records of Ray workers on the driver's stderr, without the prefixes that Ray writes, and
reports of their progress.

Workers send records to an actor, which a thread of the driver empties into its own loggers.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cli.log_setup import LEVEL_VARIABLE, set_up_logging

NAME = "haste-log-relay"
"""Name of the actor, found by the workers of the same Ray job only."""
POLL_SECONDS = 0.5
FLIGHT_SECONDS = 0.1
"""Wait before the last fetch, because workers do not wait for the arrival of their records."""
MAX_RECORDS = 10_000
"""Records that wait for the driver; the oldest are dropped beyond."""
LOGGERS = ("pipeline", "jobs")

progress_logger = logging.getLogger("pipeline.progress")
"""Its records are reports of progress at any log level; without a handler they are dropped."""
progress_logger.propagate = False
progress_logger.setLevel(logging.INFO)
progress_logger.addHandler(logging.NullHandler())

_handle: Any = None  # Ray ends an actor with its last handle; handles from get_actor() do not count


class LogRelay:
    """Actor that holds the records that the driver has not fetched, and the level of the driver."""

    def __init__(self) -> None:
        self._level = "info"
        self._records: deque[logging.LogRecord] = deque(maxlen=MAX_RECORDS)

    def set_level(self, level: str) -> None:
        self._level = level

    def level(self) -> str:
        return self._level

    def add(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def take(self) -> list[logging.LogRecord]:
        """The records since the last call, in the order of their arrival."""
        records = list(self._records)
        self._records.clear()
        return records


class RelayHandler(QueueHandler):
    """Sends records to a ``LogRelay`` and does not wait for it."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.add.remote(record)  # type: ignore[attr-defined]


@contextmanager
def relayed_logs() -> Iterator[None]:
    """In a driver that is connected to Ray: write the workers' log records to its own loggers, the
    last of them when the context ends."""
    relay = _find() or _create()
    relay.set_level.remote(os.environ.get(LEVEL_VARIABLE, "info"))
    closed = threading.Event()

    def poll() -> None:
        while not closed.wait(POLL_SECONDS):
            if not _drain(relay):
                return

    thread = threading.Thread(target=poll, name="log-relay", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join(timeout=5)
        time.sleep(FLIGHT_SECONDS)
        _drain(relay)


def set_up_worker_logging() -> None:
    """In a Ray actor: send the project's log records to the driver, at the driver's level.

    Without a relay they go to the actor's own stderr. Does nothing outside of actors.
    """
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return
    relay = _find()
    try:
        level = None if relay is None else ray.get(relay.level.remote(), timeout=30)
    except RayError:  # the relay ended with the driver
        relay = level = None
    set_up_logging(level)
    if relay is not None:
        for name in LOGGERS:
            logging.getLogger(name).handlers = [RelayHandler(relay)]
        progress_logger.handlers = [RelayHandler(relay)]


def send_progress(task: int, done: int) -> None:
    """In a Ray actor: report to the driver how much of ``task`` is done; does not wait."""
    progress_logger.info("", extra={"task": task, "done": done})


class ProgressHandler(logging.Handler):
    """In a driver: calls ``report(task, done)`` for each ``send_progress`` of a worker, in the
    thread that fetches records. A context manager."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report(record.task, record.done)  # type: ignore[attr-defined]

    def __enter__(self) -> ProgressHandler:
        progress_logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        progress_logger.removeHandler(self)


def _find() -> Any:
    try:
        return ray.get_actor(NAME)
    except ValueError:
        return None


def _create() -> Any:
    global _handle
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(LogRelay)
    _handle = actor.options(name=NAME, num_cpus=0, scheduling_strategy=here).remote()
    return _handle


def _drain(relay: Any) -> bool:
    """Hand the waiting records to the loggers that they name. False if the relay is gone."""
    try:
        records = ray.get(relay.take.remote(), timeout=5)
    except RayError:
        return False
    for record in records:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    return True
