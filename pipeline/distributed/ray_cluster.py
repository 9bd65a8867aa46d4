"""Joining a Ray cluster, or starting a private one on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray
from ray.exceptions import AuthenticationError

from pipeline.cli.log_setup import LEVEL_VARIABLE
from pipeline.distributed.log_relay import relayed_logs
from schemas.errors import UserError, plain_text

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Ray's variables for its token authentication."""
TOKEN_FILE = Path(".ray") / "auth_token"
"""Ray's token below the home folder."""
TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"
REFUSED = ("InvalidAuthToken", "Unauthenticated", "UNAUTHENTICATED", "authentication token")
"""Words of messages of a cluster that refuses a token."""

logger = logging.getLogger(__name__)

_token = secrets.token_hex(32)
"""Token of this process's own clusters; one for all, because Ray caches it."""


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connect to the cluster at ``address``, at RAY_ADDRESS, or start a private local one for the
    context, without a dashboard. An existing connection is used and stays open. Log records of
    workers are written by this process; Ray's own messages only at the log level "debug"."""
    if ray.is_initialized():
        with relayed_logs():
            yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    # Later versions of Ray will not change CUDA_VISIBLE_DEVICES of actors without GPUs, and warn
    # about it today; this code works with both.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_PROMPT_ENABLED", "0")
    debug = os.environ.get(LEVEL_VARIABLE) == "debug"
    level = logging.INFO if debug else logging.WARNING
    if not debug:  # it says that the token is used
        logging.getLogger(TOKEN_LOGGER).setLevel(logging.ERROR)
    with ExitStack() as stack:
        if address == "local":
            stack.enter_context(_own_token())
        logger.info("starting Ray" if address == "local" else "connecting to Ray's cluster")
        try:
            # because the dashboard would cost a quarter of the start's CPU time and 1 GB
            local = {"include_dashboard": False} if address == "local" else {}
            ray.init(address=address, logging_level=level, log_to_driver=debug, **local)
        except Exception as error:  # Ray raises its own types, Python's, and bare ones
            where = "on this machine" if address == "local" else f"'{address}'"
            raise UserError(f"no Ray cluster {where}: {_reason(error)}") from None
        stack.callback(ray.shutdown)
        for name in ("ray.train", "ray.data"):
            logging.getLogger(name).setLevel(level)
        with relayed_logs():
            yield


@contextmanager
def _own_token() -> Iterator[None]:
    """Give a cluster of this process a token that ends with it. Otherwise Ray writes one to the
    home folder, and each cluster that is started there later requires it. The user's own token and
    mode are used where there are any."""
    names = (MODE, TOKEN)
    before = {name: os.environ.get(name) for name in names}
    disabled = os.environ.get(MODE, "token").lower() != "token"
    if not (disabled or os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH) or _has_token_file()):
        os.environ[TOKEN] = _token
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _has_token_file() -> bool:
    try:
        return bool((Path.home() / TOKEN_FILE).read_text().strip())
    except (OSError, RuntimeError, ValueError):  # no such file, no home, or not text
        return False


def _reason(error: Exception) -> str:
    """An error of Ray in one line."""
    message = error.message if isinstance(error, AuthenticationError) else str(error)
    text = plain_text(message)[:200] or type(error).__name__
    if isinstance(error, AuthenticationError) or any(word in message for word in REFUSED):
        text += (
            f": give the cluster's token in {TOKEN} or {TOKEN_PATH}, and {MODE}=token, here and on "
            "every node"
        )
    return text


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
