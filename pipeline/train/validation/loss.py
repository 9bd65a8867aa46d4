"""Denoising loss of samples that a run does not train on, at fixed times and with fixed noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoints.store_identity import store_identity
from pipeline.models import Student
from pipeline.randomness import Purpose
from pipeline.runs.metrics import VALIDATION_LOSS
from pipeline.sampling.batches import plan_batches
from pipeline.store import Batch, Store
from pipeline.store.errors import DamagedShardError
from pipeline.store.reading.holdout import RankedSamples, ranked_samples
from pipeline.train.captions import SampleReader
from pipeline.train.inputs import Inputs
from pipeline.train.noise import SampleNoise, draw
from pipeline.train.trainer import Trainer
from pipeline.train.validation.schedule import Pause, is_due
from schemas.alignment import AlignmentConfig
from schemas.errors import UserError
from schemas.streams import caption_column

STORE_ONLY = (
    *("dataset.", "shard_size", "samples_per_shard."),
    *("text.captions_sha256", "text.columns"),
)
"""Properties in which a validation store may differ from the run's store."""
UNALIGNED = AlignmentConfig(feature_weight=0, attention_weight=0)


class ValidationLoss:
    """Measures the loss of the same samples each time: those of the lowest ranks of their keys.

    Posterior and noise of a sample are functions of its key and ``validation.seed``, equal at all
    times. No label or caption is dropped. Workers take whole batches of a fixed division, and the
    losses of single samples are summed in the order of their ranks in float64, so that the result
    does not depend on the number of workers: bit-identical on CPUs with equally many threads.
    """

    def __init__(self, trainer: Trainer, store: Store, held_out: RankedSamples | None) -> None:
        """``held_out``: the part of the run's ``store`` that is not trained on. The samples that
        this rank measures are read once, when they are first needed. Raises ``UserError`` where
        there are none, or the validation store does not fit."""
        self.trainer = trainer
        self.options = options = trainer.config.validation
        if options.store is None:
            assert held_out is not None
            samples = held_out
        else:
            store = self._open_other(options.store, store)
            samples = ranked_samples(store, workers=trainer.group)
        if not len(samples.ranks):
            part = f"data.holdout {trainer.config.data.holdout:g}"
            raise UserError(
                f"{part if options.store is None else 'validation.store'} holds no samples of "
                f"{store.shown_url}: validation.every needs some"
            )
        self.store = store
        self.samples = samples.first(options.samples)
        self.bytes_read: dict[str, int] = {}
        """Bytes by stream of the run's store; those of another store are not counted."""
        self._batches: list[tuple[range, Batch, SampleNoise]] | None = None

    def due(self, step: int) -> bool:
        return is_due(step, self.options.every, self.trainer.config.steps)

    @torch.no_grad()
    def measure(self, pause: Pause) -> dict[str, Any]:
        """The event for the metrics; every rank calls it and gets the same. ``pause`` is called
        between batches and may raise. Keys: ``validation_ema`` and ``validation_model`` (means over
        samples and times), the same with ``_t0.5`` for each time, and with ``_class_token`` the
        loss of the class token. A loss that is not finite, or of no readable sample, is None."""
        trainer, times = self.trainer, self.options.times
        students = {"ema": trainer.averaged_student(), "model": trainer.trained_student()}
        kinds = ["", "_class_token"][: 1 if trainer.inputs.class_tokens is None else 2]
        shape = (len(students), len(kinds), len(times), len(self.samples.ranks))
        table = torch.zeros(shape, device=trainer.group.device)
        if self._batches is None:
            self._batches = list(self._read())
        count = sum(len(batch.positions) for _, batch, _ in self._batches)
        for number in range(self._rounds):
            if number < len(self._batches):
                places, batch, draws = self._batches[number]
                for column, time in enumerate(times):
                    inputs = trainer.inputs(batch, draws, time=time)
                    for row, student in enumerate(students.values()):
                        table[row, :, column, places.start : places.stop] = self._losses(
                            student, inputs
                        )
            pause()
        trainer.group.sum(table)  # each loss is nonzero on one rank only
        count = trainer.group.sum_counts({"count": count})["count"]
        sums = table.cpu().numpy().sum(-1, dtype=np.float64) / (count or math.nan)
        event: dict[str, Any] = {"event": VALIDATION_LOSS}
        for one, weights in zip(sums, students, strict=True):
            for losses, kind in zip(one, kinds, strict=True):
                name = f"validation_{weights}{kind}"
                event[name] = _finite(losses.mean())
                event |= {
                    f"{name}_t{t:g}": _finite(loss) for t, loss in zip(times, losses, strict=True)
                }
        return event

    @property
    def _rounds(self) -> int:
        """Batches of the rank that has most."""
        batches = -(-len(self.samples.ranks) // self.options.batch_size)
        return -(-batches // self.trainer.group.world_size)

    def _losses(self, student: Student, inputs: Inputs) -> Tensor:
        """Losses (1, B), (2, B) with a class token, in the arithmetic of the training, but never
        compiled, because the sizes of these batches would recompile the training's graphs."""
        trainer, token = self.trainer, inputs.class_token
        loss, dtype = trainer.module.objective.loss, trainer.autocast_dtype
        compiled = trainer.module.compiled
        with (
            torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
            torch.autocast(trainer.group.device.type, dtype, enabled=dtype is not None),
        ):
            extra = {} if token is None else {"class_token_BE": token.noisy}
            out = student(*inputs[:3], **extra)
            losses = [loss(out.prediction, inputs.noisy, inputs.time, inputs.target)]
            if token is not None:
                losses.append(loss(out.class_prediction, token.noisy, inputs.time, token.target))
        return torch.stack(losses)

    def _read(self) -> Iterator[tuple[range, Batch, SampleNoise]]:
        """This rank's batches, with their places in the order of ranks."""
        group, config = self.trainer.group, self.trainer.config
        batches = plan_batches(len(self.samples.ranks), self.options.batch_size)
        inputs, seed = self.trainer.inputs, self.options.seed  # no caption is dropped
        reader = SampleReader(self.store, inputs.streams, inputs.captions, seed=seed, drop=0.0)
        for batch in batches[group.rank :: group.world_size]:
            places = np.arange(batch.first, batch.first + batch.count)
            columns, places = self._readable(reader, places)
            positions = self.samples.ranks[places]
            draws = draw(
                self.options.seed,
                positions,
                config.student.latent_shape,
                0.0,
                class_token=config.student.class_token,
                purpose=Purpose.VALIDATION,
            )
            if len(places):
                span = range(batch.first, batch.first + len(places))
                yield span, Batch(0, positions, columns), draws
        read = reader.close()
        if self.options.store is None:
            self.bytes_read.update(read)

    def _readable(
        self, reader: SampleReader, places: np.ndarray
    ) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
        """The samples at ``places``, with captions of epoch 0; with quarantine, only those that can
        be read."""

        def read(some: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
            shards, rows = self.samples.shards[some], self.samples.rows[some]
            return reader.read(shards, rows, np.zeros(len(some), np.int64))

        try:
            return read(places), places
        except DamagedShardError:
            if self.trainer.config.data.on_bad_shard == "stop":
                raise
        kept = []
        for place in places:
            try:
                read(place[None])
                kept.append(place)
            except DamagedShardError:
                continue
        some = np.array(kept, np.int64)
        return read(some), some

    def _open_other(self, url: str, own: Store) -> Store:
        """The validation store. Raises ``UserError`` where it does not fit the run's ``own``."""
        other = Store.open(url)
        if other.manifest.dataset.fingerprint == own.manifest.dataset.fingerprint:
            raise UserError(
                f"validation.store {other.shown_url} holds the images that the run is trained on: "
                "set data.holdout instead"
            )
        inputs = self.trainer.inputs
        stream = None if inputs.class_tokens is None else inputs.class_tokens.stream
        other.require_complete("latents", *([] if stream is None else [stream]))
        captions = None if inputs.captions is None else inputs.captions.stream
        wanted, found = (_identity(store, stream, captions) for store in (own, other))
        for name in {**wanted, **found}:
            if not name.startswith(STORE_ONLY) and wanted.get(name) != found.get(name):
                raise UserError(
                    f"validation.store {other.shown_url} does not fit the run's store: its {name} "
                    f"is {found.get(name)}, that of the run's store is {wanted.get(name)}"
                )
        return other


def _identity(store: Store, class_stream: str | None, captions: str | None) -> dict[str, Any]:
    """Properties of a store; of captions those of the first, because another store may hold more
    of an image."""
    if captions is None:
        return store_identity(store, UNALIGNED, class_stream)
    store.require_complete(captions)
    _, info = store.manifest.text_stream(captions)
    identity = store_identity(store, UNALIGNED, class_stream, (captions, info.encoder))
    return identity | {"caption": info.columns[caption_column(0)].model_dump()}


def _finite(value: np.floating[Any]) -> float | None:
    return float(value) if math.isfinite(value) else None
