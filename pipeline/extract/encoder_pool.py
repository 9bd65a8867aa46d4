"""A pool of encoder actors and its tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import ray

from pipeline.cli.progress import progress_bar
from pipeline.datasets import ImageItem
from pipeline.datasets.listing import describe_image
from pipeline.distributed.actor_pool import Actors
from pipeline.distributed.log_relay import (
    ProgressHandler,
    send_progress,
    set_up_worker_logging,
)
from pipeline.extract.captions import adds_captions
from pipeline.extract.tasks import Description, ShardTask
from pipeline.store.manifest_diff import differences
from schemas.calibration import Calibration
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.networks import WeightsFile
from schemas.store import Manifest

if TYPE_CHECKING:
    from pipeline.extract.encoder import ShardResult

EXPECTED_PASSES = 7
"""Passes of a calibration over its images, for the time that is left: mostly 5 to 10."""


class EncoderActor:
    """An encoder in its own process."""

    def load(self, config: ExtractConfig, device: str, threads: int) -> Description:
        # here, because the driver would import torch, timm and diffusers for seconds without use
        from pipeline.extract.encoder import CaptionEncoder, Encoder

        set_up_worker_logging()
        kind = CaptionEncoder if adds_captions(config) else Encoder
        self.encoder = kind(config, device=device, threads=threads)
        return self.encoder.describe()

    def describe_tail(self) -> WeightsFile | None:
        return self.encoder.describe_tail()

    def save_tail(self, url: str) -> WeightsFile | None:
        return self.encoder.save_tail(url)

    def null_caption(self) -> bytes | None:
        return self.encoder.null_caption()

    def calibrate(
        self, items: Sequence[ImageItem], images: int, latent_shape: tuple[int, int, int]
    ) -> Calibration:
        return self.encoder.calibrate(items, images, latent_shape, partial(send_progress, 0))

    def encode(self, url: str, manifest: Manifest, task: ShardTask) -> ShardResult:
        return self.encoder.encode_shard(url, manifest, task, partial(send_progress, task.shard))


class EncoderPool(Actors[Description]):
    """Encoder actors that write the shards and the teacher's tail of one store."""

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
        super().__init__(
            actor_class,
            lambda actor: actor.load.remote(config, device, cpus),
            count=actors,
            cpus=cpus,
            gpus=gpus,
            max_attempts=config.max_attempts,
            kind="encoder",
            check_same=_check_same,
        )

    def describe_tail(self) -> WeightsFile | None:
        """The file of the teacher's tail, if the cut has one; call ``describe`` first. Raises the
        actor's ``UserError``, or one after ``max_attempts`` failures."""
        tail: WeightsFile | None = self.call_one(
            lambda actor: actor.describe_tail.remote(),
            failed="the teacher's weights for training could not be read",
            again="the teacher's weights are read once more",
        )
        return tail

    def save_tail(self, url: str) -> WeightsFile | None:
        """Let one actor write the teacher's tail to the store. Raises as ``describe_tail`` does."""
        tail: WeightsFile | None = self.call_one(
            lambda actor: actor.save_tail.remote(url),
            failed="the teacher's weights for training could not be written",
            again="the teacher's weights are written once more",
        )
        return tail

    def null_caption(self) -> bytes | None:
        """The null caption as bytes of its file. Raises as ``describe_tail`` does."""
        null: bytes | None = self.call_one(
            lambda actor: actor.null_caption.remote(),
            failed="the null caption could not be encoded",
            again="the null caption is encoded once more",
        )
        return null

    def calibrate(
        self, items: Sequence[ImageItem], images: int, latent_shape: tuple[int, int, int]
    ) -> Calibration:
        """Let one actor choose the codecs' steps on images. Raises as ``describe_tail`` does."""
        total = EXPECTED_PASSES * images
        with progress_bar(total=total, unit="image", desc="measure codec steps") as bar:

            def show(_: int, done: int) -> None:  # begins again where an actor has died
                bar.total = max(total, done)
                bar.update(done - bar.n)

            with ProgressHandler(show):
                found: Calibration = self.call_one(
                    lambda actor: actor.calibrate.remote(items, images, latent_shape),
                    failed="the steps of the codecs could not be measured",
                    again="the steps of the codecs are measured once more",
                )
            bar.total = bar.n  # the number of passes is known at the end
        return found

    def encode(
        self, url: str, manifest: Manifest, tasks: Iterable[ShardTask]
    ) -> Iterable[ShardResult]:
        """Results in the order in which shards are finished.

        After a bad image and with ``on_bad_image: stop``, no further shard is started and running
        ones are finished. Raises ``UserError`` that names a shard which failed ``max_attempts``
        times, with its last error.
        """
        bad = False
        shared = ray.put(manifest)  # pickled once, not for every shard
        results: Iterable[ShardResult] = self.work(
            tasks,
            lambda actor, task: actor.encode.remote(url, shared, task),
            name=lambda task: f"shard {task.shard}",
            full_name=self._full_name,
            enough=lambda: bad and self.config.on_bad_image == "stop",
        )
        for result in results:
            bad |= bool(result.bad_images)
            yield result

    def _full_name(self, task: ShardTask) -> str:
        first = task.items[0]
        shown = describe_image(self.config.dataset, first.key, f"'{first.path}'")
        return f"shard {task.shard} (first image {shown})"


def _check_same(one: Description, other: Description) -> None:
    """Raises ``UserError`` that names the first difference."""
    for path, a, b in differences(_dumped(one), _dumped(other), []):
        raise UserError(
            "encoder actors differ in weights, device or library versions: "
            f"{path} is {a} and {b}; give every node the same image"
        )


def _dumped(description: Description) -> dict[str, object]:
    parts = {name: getattr(description, name) for name in ("teacher", "autoencoder", "compute")}
    if description.text is not None:
        parts |= {f"text.{name}": getattr(description.text, name) for name in ("info", "null")}
    return {name: None if part is None else part.model_dump() for name, part in parts.items()}
