"""Images that all workers of a run draw together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.autoencoders import open_decoder
from pipeline.distributed.process_group import ProcessGroup
from pipeline.models import SiT
from pipeline.precision import arithmetic, choose_arithmetic
from pipeline.sampling.batches import plan_batches
from pipeline.sampling.generate import check_sampler, draw_latents
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.store import Manifest

Pause = Callable[[], None]
"""Called between two batches, equally often on every rank: what is asked of the run meanwhile is
heard there, and may end it."""


def is_due(step: int, every: int | None, last: int) -> bool:
    """After every so many steps, and after the last; None: never."""
    return every is not None and (step % every == 0 or step == last)


@dataclass(frozen=True)
class SampledBatch:
    """One batch."""

    numbers: range
    images: Tensor
    """uint8 (B, 3, R, R) on the CPU."""
    broken: int
    """How many are black as their latents are no finite numbers."""


class DistributedSampler:
    """The images are the same whatever the number of workers, as each takes whole batches of a
    fixed division."""

    def __init__(self, config: RunConfig, manifest: Manifest, parallel: ProcessGroup) -> None:
        """Raises ``UserError`` where the sampler is not for the student, or the autoencoder cannot
        be loaded."""
        self.options = config.samples
        self.path = config.diffusion.path
        self.parallel = parallel
        check_sampler(config.student, self.options.sampler, option="--samples.sampler.method")
        self.autoencoder = open_decoder(
            self.options.autoencoder, manifest.autoencoder, option="--samples.autoencoder"
        )
        self.precision = choose_arithmetic("auto", parallel.device.type)
        self.resolution = manifest.resolution
        self.num_classes = manifest.dataset.num_classes

    def draw(self, student: SiT, labels: Sequence[int], pause: Pause) -> Iterator[SampledBatch]:
        """The batches of this rank's share of ``labels``, one image each. Every rank calls it, and
        takes all that it yields. Raises ``UserError`` where memory is short."""
        batches = plan_batches(len(labels), self.options.batch_size)
        rank, world_size = self.parallel.rank, self.parallel.world_size
        with self._autoencoder_at_hand():
            for start in range(0, len(batches), world_size):
                if start + rank < len(batches):
                    batch = batches[start + rank]
                    numbers = range(batch.first, batch.first + batch.count)
                    yield self._draw(student, [labels[i] for i in numbers], numbers)
                pause()

    def _draw(self, student: SiT, labels: Sequence[int], numbers: range) -> SampledBatch:
        with self.enough_memory(len(labels)):
            latents = draw_latents(
                student,
                labels,
                self.options.sampler,
                path=self.path,
                first_index=numbers.start,
                precision=self.precision,
            )
            finite = latents.isfinite().flatten(1).all(1)
            with arithmetic(self.precision):
                images = self.autoencoder.decode(torch.nan_to_num(latents)).cpu()
        images[~finite.cpu()] = 0
        return SampledBatch(numbers, images, broken=int((~finite).sum()))

    @contextmanager
    def enough_memory(self, count: int) -> Iterator[None]:
        """Raises ``UserError`` where a GPU's is too small for ``count`` samples."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise UserError(
                f"a GPU has no memory for {count} samples at a time beside the training; "
                f"try a smaller --samples.batch-size than {self.options.batch_size}"
            ) from None

    @contextmanager
    def _autoencoder_at_hand(self) -> Iterator[None]:
        """On the device; afterwards its memory is the training's again."""
        self.autoencoder.to(self.parallel.device)
        try:
            yield
        finally:
            self.autoencoder.to("cpu")
