"""Access to files of the Hugging Face hub that fails within seconds where there is no network."""

from __future__ import annotations

import contextlib
import queue
import re
import threading
from collections.abc import Iterator, Sequence

import huggingface_hub as hub
from huggingface_hub import constants

from pipeline.storage.files import redact
from schemas.errors import plain_text

CONNECT_SECONDS = 5.0
_failures: dict[str, str] = {}
"""Reasons by endpoint."""


class HubUnreachableError(Exception):
    """The hub cannot be reached, and a file is not in the local cache; the message says both."""


@contextlib.contextmanager
def hub_access(repo: str, filenames: Sequence[str]) -> Iterator[None]:
    """Let a library load files of ``repo``, of which it needs one of ``filenames``.

    Without the hub, cached files are used; the library would first repeat its request for a minute.
    ``HF_HUB_OFFLINE`` and the cache folders of the environment are respected. Raises
    ``HubUnreachableError``.
    """
    reason = _unreachable()
    if reason is not None and not any(_is_cached(repo, name) for name in filenames):
        raise HubUnreachableError(
            f"is not in the cache '{constants.HF_HUB_CACHE}', and {plain_text(reason)[:150]}"
        )
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or reason is not None
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def is_hub_id(name: str) -> bool:
    """True for what can be the name of a repository, with or without its owner."""
    return re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name) is not None and not name.startswith(".")


def _is_cached(repo: str, filename: str) -> bool:
    cached = hub.try_to_load_from_cache(repo, filename, cache_dir=constants.HF_HUB_CACHE)
    return isinstance(cached, str)


def _unreachable() -> str | None:
    """Reason why the hub cannot be reached, None if it can. A failure is remembered: the next
    network of the same command does not wait again."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    if constants.ENDPOINT not in _failures:
        reason = _attempt(constants.ENDPOINT)
        if reason is None:
            return None
        _failures[constants.ENDPOINT] = reason
    return f"{redact(constants.ENDPOINT)} cannot be reached ({_failures[constants.ENDPOINT]})"


def _attempt(endpoint: str) -> str | None:
    """Reason why one request failed, None if it was answered, after ``CONNECT_SECONDS`` at most:
    the timeout of a request covers neither the look-up of a name nor a second address."""
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def request() -> None:
        try:
            # one request without the library's repetitions, by its proxies and certificates
            hub.get_session().head(endpoint, timeout=CONNECT_SECONDS)
        except Exception as error:  # the types are those of the library's HTTP client
            answers.put(str(error) or type(error).__name__)
        else:
            answers.put(None)

    threading.Thread(target=request, name="hub", daemon=True).start()
    try:
        return answers.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        return f"no answer within {CONNECT_SECONDS:g} seconds"
