"""Encoder actors, and what they are kept at work on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.distributed.actor_pool import Actors
from pipeline.distributed.log_relay import set_up_worker_logging
from pipeline.extract.encoder import Encoder, ShardResult
from pipeline.extract.tasks import Description, ShardTask
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.store import Manifest, WeightsFile


class EncoderActor:
    """An encoder in a process of its own."""

    def load(self, config: ExtractConfig, device: str, threads: int) -> Description:
        set_up_worker_logging()
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
        actor_class: type[EncoderActor] = EncoderActor,
    ) -> None:
        self.config = config
        device = "cuda" if gpus else "cpu"
        self.actors: Actors[Description] = Actors(
            actor_class,
            lambda actor: actor.load.remote(config, device, cpus),
            count=actors,
            cpus=cpus,
            gpus=gpus,
            max_attempts=config.max_attempts,
            kind="encoder",
            check_same=_check_same,
        )

    def describe(self) -> Description:
        """Wait for the first actor to load. Raises its ``UserError``."""
        return self.actors.describe()

    def save_tail(self, url: str) -> WeightsFile | None:
        """Have a loaded actor write what training needs of the teacher; after ``describe``. Raises
        its ``UserError``, and one where it failed ``max_attempts`` times."""
        tail: WeightsFile | None = self.actors.call_one(
            lambda actor: actor.save_tail.remote(url),
            failed="the teacher's weights for training could not be written",
            again="the teacher's weights are written once more",
        )
        return tail

    def encode(
        self, url: str, manifest: Manifest, tasks: Iterable[ShardTask]
    ) -> Iterable[ShardResult]:
        """Results as shards are finished. Stops handing out shards after a bad image where the
        config says so, and finishes those at work. Raises ``UserError`` naming a shard that failed
        ``max_attempts`` times, with its last error."""
        bad = False

        def begin(actor: Any, task: ShardTask) -> Any:
            return actor.encode.remote(url, manifest, task)

        results: Iterable[ShardResult] = self.actors.work(
            tasks,
            begin,
            name=lambda task: f"shard {task.shard}",
            full_name=lambda task: f"shard {task.shard} (first image '{task.items[0].path}')",
            enough=lambda: bad and self.config.on_bad_image == "stop",
        )
        for result in results:
            bad |= bool(result.bad_images)
            yield result

    def close(self) -> None:
        """End every actor."""
        self.actors.close()


def _check_same(one: Description, other: Description) -> None:
    if one != other:
        raise UserError(
            "encoder actors differ in weights, device or library versions: "
            f"{_difference(one, other)}; give every node the same image"
        )


def _difference(one: Description, other: Description) -> str:
    for part in ("teacher", "autoencoder", "compute"):
        if getattr(one, part) is None:
            continue
        a, b = getattr(one, part).model_dump(), getattr(other, part).model_dump()
        for key, value in a.items():
            if value != b[key]:
                return f"{part}.{key} is {value} and {b[key]}"
    return "unknown"
