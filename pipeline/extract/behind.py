"""Work that a thread does behind its caller, in order, a little at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Behind:
    """A thread that does calls in the order in which they come, ``limit`` of them waiting at most.

    A context; leaving it waits for the call under way and forgets those behind it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Future[Any]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Waits while too many are waiting. Raises what an earlier call raised."""
        while len(self._waiting) >= self._limit or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(call, *arguments))

    def finish(self) -> None:
        """Wait for all. Raises what one of them raised."""
        while self._waiting:
            self._waiting.popleft().result()
