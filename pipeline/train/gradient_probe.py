"""Gradient cosines of a run in progress, for the termination trigger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.randomness import Purpose, generator
from pipeline.store import Batch, SampleOrder, Store
from pipeline.store.errors import DamagedShardError
from pipeline.store.reading.batch_loader import rank_slice
from pipeline.train.captions import SampleReader
from pipeline.train.trainer import Trainer

CHUNK = 32  # samples of one pass, unless workers.micro_batch is smaller


class GradientProbe:
    """Cosine between the gradients of the two losses on one block (HASTE section 2.2, appendix
    A.2), the block at the feature depth, with several teacher streams the lowest of these, which
    all feature losses depend on.

    Samples, noise and posterior draws are functions of the seed and the step, so that the result
    does not depend on the number of ranks.
    """

    def __init__(self, trainer: Trainer, store: Store, order: SampleOrder) -> None:
        self.trainer = trainer
        self.store = store
        self.order = order
        self.bytes_read: dict[str, int] = {}

    def gradient_cosines(self, times: Sequence[float], samples: int) -> list[float]:
        """Cosine between the gradients of the weighted alignment losses and of the denoising loss,
        at each time; 0 where one of them vanishes. Every rank calls it."""
        trainer = self.trainer
        streams = trainer.config.alignment.streams
        depths = [options.feature_depth for options in streams if options.feature_weight]
        depth = min(depths, default=streams[0].feature_depth)
        parameters = list(trainer.module.student.blocks[depth - 1].parameters())
        size = sum(parameter.numel() for parameter in parameters)
        sums = torch.zeros(len(times), 2, size, device=trainer.group.device)
        for batch in self._batches(samples):
            # A compiled backward pass frees its buffers and cannot run twice, and the probe's batch
            # size would recompile the training's graphs.
            with torch.compiler.set_stance("force_eager"):
                targets = trainer.targets_of(batch)
                for row, time in zip(sums, times, strict=True):
                    inputs = trainer.inputs(batch, time=time)
                    losses = trainer.losses(trainer.module, inputs, targets)
                    row[0] += _gradient(trainer.alignment_loss(losses), parameters, keep=True)
                    row[1] += _gradient(trainer.denoising_loss(losses), parameters, keep=False)
        trainer.group.sum(sums)
        cosines: list[float] = torch.cosine_similarity(sums[:, 0], sums[:, 1], dim=1).tolist()
        return cosines

    def _batches(self, samples: int) -> Iterator[Batch]:
        """This rank's share of ``samples`` distinct samples, drawn from the whole data set."""
        trainer = self.trainer
        rng = generator(Purpose.PROBE, trainer.config.seed, trainer.step)
        total = min(samples, self.order.epoch_size)
        chosen = np.sort(rng.choice(self.order.epoch_size, size=total, replace=False))
        begin, end = rank_slice(total, trainer.group.rank, trainer.group.world_size)
        reader = SampleReader(
            self.store,
            [*trainer.inputs.streams, *trainer.teacher_streams],
            trainer.inputs.captions,
            seed=trainer.config.seed,
            drop=trainer.config.diffusion.label_drop,
        )
        chunk = min(CHUNK, trainer.config.workers.micro_batch or CHUNK)
        for start in range(begin, end, chunk):
            positions = chosen[start : min(start + chunk, end)].astype(np.int64)
            yield from self._read(reader, positions)
        for name, count in reader.close().items():
            self.bytes_read[name] = self.bytes_read.get(name, 0) + count

    def _read(self, reader: SampleReader, positions: np.ndarray) -> Iterator[Batch]:
        """One batch; with quarantine, only its readable samples. Readability is a property of the
        store, so that the result still does not depend on the number of ranks."""
        shards, rows = self.order.locate(positions)
        try:
            columns = reader.read(shards, rows, self.order.epochs_of(positions))
        except DamagedShardError:
            if self.trainer.config.data.on_bad_shard == "stop":
                raise
            if len(positions) > 1:
                for position in np.split(positions, len(positions)):
                    yield from self._read(reader, position)
            return
        yield Batch(self.trainer.step, positions, columns)


def _gradient(loss: Tensor, parameters: Sequence[Tensor], *, keep: bool) -> Tensor:
    """The flat gradient of ``loss``, zeros where it does not depend on a parameter."""
    if not loss.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), device=loss.device)
    parts = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(parameters, parts, strict=True)
        ]
    )
