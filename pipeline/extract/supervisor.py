"""The loop that keeps encoder actors at work and survives their deaths.

Plain actors under a driver loop: an actor never restarts by itself (Ray's own restarts retry a
shard that kills its actor without end); the driver requeues the shard, up to a limit, and starts
another actor.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.cluster import PatienceWarning, SilenceWarning
from pipeline.extract.encoder import Encoder, ShardResult
from pipeline.extract.plan import Description, ShardTask
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.store import Manifest, WeightsFile


class EncoderActor:
    """An encoder in a process of its own."""

    def load(self, config: ExtractConfig, device: str, threads: int) -> Description:
        """Not the constructor, whose errors Ray turns into a dead actor without a message."""
        self.encoder = Encoder(config, device=device, threads=threads)
        return self.encoder.describe()

    def save_tail(self, url: str) -> WeightsFile | None:
        return self.encoder.save_tail(url)

    def encode(self, url: str, manifest: Manifest, task: ShardTask) -> ShardResult:
        return self.encoder.encode_shard(url, manifest, task)


class Supervisor:
    """Encoder actors, and the shards that they still have to make."""

    def __init__(
        self,
        config: ExtractConfig,
        *,
        actors: int,
        cpus: int,
        gpus: float,
        log: Callable[[str], None],
        actor_class: type[EncoderActor] = EncoderActor,
    ) -> None:
        self.config = config
        self.cpus = cpus
        self.gpus = gpus
        self.log = log
        self.remote = ray.remote(actor_class).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )
        self.description: Description | None = None
        self._idle: list[Any] = []
        self._loading: dict[Any, Any] = {}  # ref -> actor
        self._working: dict[Any, tuple[Any, ShardTask]] = {}  # ref -> (actor, task)
        self._silence: dict[int, SilenceWarning] = {}  # by shard at work
        self._deaths_while_loading = 0
        for _ in range(actors):
            self._spawn()

    def describe(self) -> Description:
        """Wait for the first actor to load. Raises its ``UserError``."""
        patience = PatienceWarning(
            f"waiting for the cluster to have {self.cpus} free CPUs and {self.gpus:g} free GPUs"
        )
        while self.description is None:
            self._wait(patience)
        return self.description

    def save_tail(self, url: str) -> WeightsFile | None:
        """Have a loaded actor write what training needs of the teacher; after ``describe``. Raises
        its ``UserError``, and one where it failed ``max_attempts`` times."""
        patience = PatienceWarning("no encoder is free to start; waiting for the cluster")
        attempts = 0
        while True:
            while not self._idle:
                self._wait(patience)
            actor = self._idle[0]
            outcome = _get(actor.save_tail.remote(url))
            if outcome is None or isinstance(outcome, WeightsFile):
                return outcome
            if isinstance(outcome, UserError):
                raise outcome
            attempts += 1
            if attempts >= self.config.max_attempts:
                raise UserError(
                    f"the teacher's weights for training could not be written, {attempts} times; "
                    f"the last error: {_one_line(outcome)}"
                )
            self.log(f"the teacher's weights are written once more: {_one_line(outcome)}")
            if _is_dead(outcome):
                self._idle.remove(actor)
                self._replace(actor)

    def encode(
        self, url: str, manifest: Manifest, tasks: Iterable[ShardTask]
    ) -> Iterable[ShardResult]:
        """Results as shards are finished. Stops handing out shards after a bad image where the
        config says so, and finishes those at work. Raises ``UserError`` naming a shard that failed
        ``max_attempts`` times, with its last error."""
        pending = deque(tasks)
        attempts: Counter[int] = Counter()
        patience = PatienceWarning("no encoder is free to start; waiting for the cluster")
        stopping = False
        while (pending and not stopping) or self._working:
            while pending and self._idle and not stopping:
                actor, task = self._idle.pop(), pending.popleft()
                attempts[task.shard] += 1
                self._working[actor.encode.remote(url, manifest, task)] = (actor, task)
                self._silence[task.shard] = SilenceWarning()
            for actor, task, outcome in self._wait(patience):
                if isinstance(outcome, ShardResult):
                    stopping |= bool(outcome.bad_images) and self.config.on_bad_image == "stop"
                    self._idle.append(actor)
                    yield outcome
                    continue
                if isinstance(outcome, UserError):
                    raise outcome
                if attempts[task.shard] >= self.config.max_attempts:
                    raise UserError(
                        f"shard {task.shard} (first image '{task.items[0].path}') failed "
                        f"{attempts[task.shard]} times; the last error: {_one_line(outcome)}"
                    )
                self.log(f"shard {task.shard} goes back to the queue: {_one_line(outcome)}")
                pending.appendleft(task)
                if _is_dead(outcome):
                    self._replace(actor)
                else:
                    self._idle.append(actor)

    def close(self) -> None:
        """End every actor."""
        actors = [*self._idle, *self._loading.values(), *(a for a, _ in self._working.values())]
        for actor in actors:
            ray.kill(actor, no_restart=True)
        self._idle, self._loading, self._working, self._silence = [], {}, {}, {}

    def _spawn(self) -> None:
        actor = self.remote.remote()
        device = "cuda" if self.gpus else "cpu"
        self._loading[actor.load.remote(self.config, device, self.cpus)] = actor

    def _replace(self, actor: Any) -> None:
        ray.kill(actor, no_restart=True)
        self._spawn()

    def _wait(self, patience: PatienceWarning) -> list[tuple[Any, ShardTask, Any]]:
        """Actors that finished or failed a shard: (actor, task, result or error)."""
        refs = [*self._loading, *self._working]
        ready, _ = ray.wait(refs, num_returns=1, timeout=1.0)
        if not (ready or self._working or self._idle):
            message = patience.still_waiting()
            if message:
                self.log(message)
        finished = []
        for ref in ready:
            outcome = _get(ref)
            if ref in self._loading:
                self._loaded(self._loading.pop(ref), outcome)
            else:
                actor, task = self._working.pop(ref)
                del self._silence[task.shard]
                finished.append((actor, task, outcome))
        self._tell_of_silence()
        return finished

    def _tell_of_silence(self) -> None:
        """An actor may be slow or hang: who waits should know, and decide."""
        for shard, silence in self._silence.items():
            minutes = silence.minutes()
            if minutes is not None:
                self.log(f"shard {shard} has been with an actor for {minutes} minutes")

    def _loaded(self, actor: Any, outcome: Any) -> None:
        if isinstance(outcome, Description):
            if self.description is None:
                self.description = outcome
            elif outcome != self.description:
                raise UserError(
                    "encoder actors differ in weights, device or library versions: "
                    f"{_difference(self.description, outcome)}; give every node the same image"
                )
            self._idle.append(actor)
            self._deaths_while_loading = 0
            return
        if isinstance(outcome, UserError):
            raise outcome
        self._deaths_while_loading += 1
        if self._deaths_while_loading >= self.config.max_attempts:
            raise UserError(f"encoder actors die while loading: {_one_line(outcome)}")
        self._replace(actor)


def _get(ref: Any) -> Any:
    """The result of a finished call, or its error as a value."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    except RayError as error:  # the actor, its node or its memory is gone
        return error


def _is_dead(outcome: Any) -> bool:
    """Whether that is the end of an actor, not of its task alone."""
    return isinstance(outcome, RayError) and not isinstance(outcome, RayTaskError)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


def _difference(one: Description, other: Description) -> str:
    for part in ("teacher", "autoencoder", "compute"):
        if getattr(one, part) is None:
            continue
        a, b = getattr(one, part).model_dump(), getattr(other, part).model_dump()
        for key, value in a.items():
            if value != b[key]:
                return f"{part}.{key} is {value} and {b[key]}"
    return "unknown"
