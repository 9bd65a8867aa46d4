"""A pool of Ray actors that survives deaths of actors.

Actors do not restart by themselves, because Ray would retry a task that kills its actor forever.
The driver requeues the task, up to a limit, and starts another actor. An actor that dies while
loading is replaced up to the same limit, so that a bad node does not stop the others.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.distributed.ray_cluster import PatienceWarning, SilenceWarning
from schemas.errors import UserError

logger = logging.getLogger(__name__)

A = TypeVar("A")
"""Description that an actor returns when it has loaded."""
T = TypeVar("T")
R = TypeVar("R")


def _nothing() -> None:
    pass


class Actors(Generic[A]):
    """Actors of one class, any of which can take any task.

    A ``UserError`` of an actor ends the work at once, because a retry would not help. Deaths while
    loading end it with a ``UserError`` if no actor remains.
    """

    def __init__(
        self,
        actor_class: type,
        load: Callable[[Any], Any],
        *,
        count: int,
        cpus: float,
        gpus: float,
        max_attempts: int,
        kind: str,
        check_same: Callable[[A, A], None],
        between: Callable[[], None] = _nothing,
    ) -> None:
        """``load`` starts an actor's first call, which returns its description (not the
        constructor, whose errors Ray turns into a dead actor without a message); ``check_same``
        raises if two descriptions differ. ``kind`` names such an actor in messages. ``between`` is
        called at least every second of waiting, and may raise to end the work.
        """
        self.load = load
        self.cpus = cpus
        self.gpus = gpus
        self.max_attempts = max_attempts
        self.kind = kind
        self.check_same = check_same
        self.between = between
        self.remote = ray.remote(actor_class).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )
        self.about: A | None = None
        self._idle: list[Any] = []
        self._loading: dict[Any, tuple[Any, int]] = {}
        """ref of the load -> (actor, deaths of its predecessors while loading)"""
        self._working: dict[Any, tuple[Any, Any]] = {}  # ref -> (actor, task)
        self._silence: dict[str, SilenceWarning] = {}  # by name of the task at work
        self._silence_at = 0.0  # next look at them
        self._name: Callable[[Any], str] = str
        for _ in range(count):
            self._spawn()

    def describe(self) -> A:
        """Wait for the first actor to load. Raises its ``UserError``."""
        patience = PatienceWarning(
            f"waiting for the cluster to have free CPUs ({self.cpus:g})"
            + (f" and GPUs ({self.gpus:g})" if self.gpus else "")
        )
        while self.about is None:
            self._wait(patience)
        return self.about

    def call_one(self, begin: Callable[[Any], Any], *, failed: str, again: str) -> Any:
        """Run ``begin`` on one actor and wait for the result; call it after ``describe``. Raises
        the actor's ``UserError``, and one that starts with ``failed`` after ``max_attempts``
        failures. ``again`` is logged before another attempt."""
        patience = self._patience()
        attempts = 0
        while True:
            while not self._idle:
                self._wait(patience)
            actor = self._idle[0]
            outcome = _get(begin(actor))
            if isinstance(outcome, UserError):
                raise outcome
            if not isinstance(outcome, Exception):
                return outcome
            attempts += 1
            if attempts >= self.max_attempts:
                raise UserError(f"{failed}, {attempts} times; the last error: {_one_line(outcome)}")
            logger.warning("%s: %s", again, _one_line(outcome))
            if _is_dead(outcome):
                self._idle.remove(actor)
                self._replace(actor)

    def work(
        self,
        tasks: Iterable[T],
        begin: Callable[[Any, T], Any],
        *,
        name: Callable[[T], str],
        full_name: Callable[[T], str] | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> Iterator[R]:
        """Yield the results of ``begin(actor, task)`` in the order in which tasks finish.

        ``name`` must be unique to a task. Once ``enough()`` is true, no further task is started and
        running ones are finished. Raises an actor's ``UserError``, and one with the ``full_name``
        of a task that failed ``max_attempts`` times, with its last error.
        """
        self._name = name
        pending = deque(tasks)
        attempts: Counter[str] = Counter()
        patience = self._patience()
        while (pending and not enough()) or self._working:
            while pending and self._idle and not enough():
                actor, task = self._idle.pop(), pending.popleft()
                attempts[name(task)] += 1
                self._working[begin(actor, task)] = (actor, task)
                self._silence[name(task)] = SilenceWarning()
            for actor, task, outcome in self._wait(patience):
                if not isinstance(outcome, Exception):
                    self._idle.append(actor)
                    yield outcome
                    continue
                if isinstance(outcome, UserError):
                    raise outcome
                if attempts[name(task)] >= self.max_attempts:
                    raise UserError(
                        f"{(full_name or name)(task)} failed {attempts[name(task)]} times; the "
                        f"last error: {_one_line(outcome)}"
                    )
                logger.warning("%s goes back to the queue: %s", name(task), _one_line(outcome))
                pending.appendleft(task)
                if _is_dead(outcome):
                    self._replace(actor)
                else:
                    self._idle.append(actor)

    def close(self) -> None:
        """End every actor."""
        held = [*self._loading.values(), *self._working.values()]
        actors = [*self._idle, *(actor for actor, _ in held)]
        for actor in actors:
            ray.kill(actor, no_restart=True)
        self._idle, self._loading, self._working, self._silence = [], {}, {}, {}

    def _patience(self) -> PatienceWarning:
        return PatienceWarning(f"no {self.kind} is free to start; waiting for the cluster")

    def _spawn(self, deaths: int = 0) -> None:
        actor = self.remote.remote()
        self._loading[self.load(actor)] = (actor, deaths)

    def _replace(self, actor: Any, deaths: int = 0) -> None:
        ray.kill(actor, no_restart=True)
        self._spawn(deaths)

    def _wait(self, patience: PatienceWarning) -> list[tuple[Any, Any, Any]]:
        """Actors that finished or failed a task: (actor, task, result or error)."""
        refs = [*self._loading, *self._working]
        ready, _ = ray.wait(refs, num_returns=1, timeout=1.0)
        self.between()
        if not (ready or self._working or self._idle):
            message = patience.still_waiting()
            if message:
                logger.info(message)
        finished = []
        for ref in ready:
            outcome = _get(ref)
            if ref in self._loading:
                self._loaded(*self._loading.pop(ref), outcome)
            else:
                actor, task = self._working.pop(ref)
                del self._silence[self._name(task)]
                finished.append((actor, task, outcome))
        self._report_long_tasks()
        return finished

    def _report_long_tasks(self) -> None:
        """Log tasks that take long, because an actor may be slow or hang. Looks at most once a
        second, because a thousand actors finish a thousand tasks in that time."""
        if time.monotonic() < self._silence_at:
            return
        self._silence_at = time.monotonic() + 1.0
        for name, silence in self._silence.items():
            minutes = silence.minutes()
            if minutes is not None:
                logger.warning("%s has been with an actor for %d minutes", name, minutes)

    def _loaded(self, actor: Any, deaths: int, outcome: Any) -> None:
        if isinstance(outcome, UserError):
            raise outcome
        if isinstance(outcome, Exception):
            self._died_while_loading(actor, deaths + 1, _one_line(outcome))
            return
        if self.about is None:
            self.about = outcome
        else:
            self.check_same(self.about, outcome)
        self._idle.append(actor)

    def _died_while_loading(self, actor: Any, deaths: int, reason: str) -> None:
        """Replace the actor or give it up. Raises ``UserError`` if no actor has loaded and all that
        are loading replace dead ones."""
        if deaths < self.max_attempts:
            logger.warning(
                "an actor for %s died while loading, another is started: %s", self.kind, reason
            )
            self._replace(actor, deaths)
            return
        ray.kill(actor, no_restart=True)
        hopeful = any(not before for _, before in self._loading.values())
        if not (self._idle or self._working or hopeful):
            raise UserError(f"{self.kind} actors die while loading: {reason}")
        logger.warning(
            "an actor for %s died while loading, %d times in a row, and is not replaced; the "
            "others continue: %s",
            self.kind,
            deaths,
            reason,
        )


def _get(ref: Any) -> Any:
    """The result of a finished call, or its error."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    except RayError as error:  # the actor, its node or its memory is gone
        return error


def _is_dead(outcome: Any) -> bool:
    """True if the actor died, not only its task."""
    return isinstance(outcome, RayError) and not isinstance(outcome, RayTaskError)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
