"""Joining a Ray cluster, or starting a private one on this machine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pipeline.cli.log_setup import LEVEL_VARIABLE
from pipeline.distributed.log_relay import relayed_logs
from schemas.errors import UserError, plain_text


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connect to the cluster at ``address``, at RAY_ADDRESS, or start a private local one for the
    context. An existing connection is used and stays open. Log records of workers are written by
    this process; Ray's own messages only at the log level "debug"."""
    if ray.is_initialized():
        with relayed_logs():
            yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # Later versions of Ray will not change CUDA_VISIBLE_DEVICES of actors without GPUs, and warn
    # about it today; this code works with both.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_PROMPT_ENABLED", "0")
    debug = os.environ.get(LEVEL_VARIABLE) == "debug"
    level = logging.INFO if debug else logging.WARNING
    try:
        ray.init(address=address or "local", logging_level=level, log_to_driver=debug)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"'{address}'" if address else "on this machine"
        reason = plain_text(str(error))[:200]
        raise UserError(f"no Ray cluster {where}: {reason}") from None
    for name in ("ray.train", "ray.data"):
        logging.getLogger(name).setLevel(level)
    try:
        with relayed_logs():
            yield
    finally:
        ray.shutdown()


def total(resource: str) -> float:
    """Amount of 'CPU' or 'GPU' of the whole cluster."""
    return float(ray.cluster_resources().get(resource, 0))


def require(resource: str, each: float, count: int, *, option: str) -> None:
    """Raise ``UserError`` if the cluster can never hold ``count`` processes that need ``each`` of a
    resource."""
    have = total(resource)
    if each * count > have:
        wanted = f"{each:g} {resource}{'s' if each != 1 else ''}"
        raise UserError(
            f"{option} asks for {count} x {wanted}; the Ray cluster has {have:g} {resource}s"
        )


class PatienceWarning:
    """A message that is due once, after a long wait."""

    def __init__(self, message: str, seconds: float = 30.0) -> None:
        self.message = message
        self.deadline = time.monotonic() + seconds

    def still_waiting(self) -> str | None:
        """The message at the first call after the deadline, else None."""
        if time.monotonic() < self.deadline:
            return None
        self.deadline = float("inf")
        return self.message


class SilenceWarning:
    """Duration of a task, due after ``seconds`` and whenever that time has doubled."""

    def __init__(self, seconds: float = 600.0) -> None:
        self.began = time.monotonic()
        self._next = seconds

    def minutes(self) -> int | None:
        """Whole minutes since the beginning if a report is due, else None."""
        quiet = time.monotonic() - self.began
        if quiet < self._next:
            return None
        while self._next <= quiet:
            self._next *= 2
        return int(quiet // 60)
