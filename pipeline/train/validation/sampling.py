"""Sampling shared between all workers of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.autoencoders import open_decoder
from pipeline.distributed.process_group import ProcessGroup
from pipeline.models import Student
from pipeline.precision import arithmetic, choose_arithmetic
from pipeline.sampling.batches import plan_batches
from pipeline.sampling.generate import check_guidance, check_sampler, draw_latents
from pipeline.sampling.prompts import PromptEmbedder, open_prompts
from pipeline.train.validation.schedule import Pause
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.sample import SampleConfig, SampleTextConfig
from schemas.store import Manifest

if TYPE_CHECKING:
    from pipeline.text_encoders import TextEncoder


def _open_captions(
    config: RunConfig, manifest: Manifest, device: torch.device, encoder: TextEncoder | None
) -> PromptEmbedder | None:
    """The captions to draw, of a student that reads captions. Raises ``UserError``."""
    if config.student.family != "MMDiT":
        return None
    samples, stream = config.samples, config.diffusion.text_stream
    store = None if samples.captions is not None else samples.store or config.store
    own = samples.store is None and samples.captions is None
    text = SampleTextConfig(stream=stream if own else None)
    options = SampleConfig(
        captions=samples.captions, store=store, sampler=samples.sampler, text=text
    )
    trained = manifest.text_stream(stream)[1].encoder
    try:
        prompts = open_prompts(options)
        assert prompts is not None
        return PromptEmbedder(prompts, trained, options, device=device, encoder=encoder)
    except UserError as error:
        if own:
            raise
        named = re.sub("--(store|captions) ", r"--samples.\1 ", str(error))  # of jobs/sample.py
        raise UserError(named) from None


@dataclass(frozen=True)
class SampledBatch:
    """Images of one batch."""

    numbers: range
    images: Tensor
    """uint8 (B, 3, R, R) on the CPU."""
    broken: int
    """Number of black images, whose latents were not finite."""


class DistributedSampler:
    """Sampler whose images do not depend on the number of workers, because each worker takes whole
    batches of a fixed division."""

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        group: ProcessGroup,
        encoder: TextEncoder | None = None,
    ) -> None:
        """``encoder`` of captions, if the training has loaded it. Raises ``UserError`` if the
        sampler does not suit the student, or the autoencoder cannot be loaded."""
        self.options = config.samples
        self.path = config.diffusion.path
        self.group = group
        check_sampler(config.student, self.options.sampler, option="--samples.sampler.method")
        null_label = config.student.num_classes if config.diffusion.label_drop else None
        check_guidance(null_label, self.options.sampler, option="--samples.sampler.guidance")
        self.embedder = _open_captions(config, manifest, group.device, encoder)
        self.autoencoder = open_decoder(
            self.options.autoencoder, manifest.autoencoder, option="--samples.autoencoder"
        )
        self.precision = choose_arithmetic("auto", group.device.type)
        self.resolution = manifest.resolution
        self.classes = manifest.dataset.classes

    def sample(
        self, student: Student, labels: Sequence[int], pause: Pause
    ) -> Iterator[SampledBatch]:
        """Batches of this rank's share of one image per label, which is a class or the number of a
        caption. Every rank calls it and consumes it to the end. Raises ``UserError`` where GPU
        memory is too small."""
        batches = plan_batches(len(labels), self.options.batch_size)
        rank, world_size = self.group.rank, self.group.world_size
        with self._autoencoder_on_device():
            for start in range(0, len(batches), world_size):
                if start + rank < len(batches):
                    batch = batches[start + rank]
                    numbers = range(batch.first, batch.first + batch.count)
                    yield self._sample(student, [labels[i] for i in numbers], numbers)
                pause()

    def _sample(self, student: Student, labels: Sequence[int], numbers: range) -> SampledBatch:
        with self.enough_memory(len(labels)):
            latents = draw_latents(
                student,
                labels if self.embedder is None else self.embedder(labels),
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
        """Raises ``UserError`` where a GPU's memory is too small for ``count`` samples."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise UserError(
                f"a GPU has no memory for {count} samples at a time beside the training; "
                f"try a smaller --samples.batch-size than {self.options.batch_size}"
            ) from None

    @contextmanager
    def _autoencoder_on_device(self) -> Iterator[None]:
        """The autoencoder is on the device inside, and on the CPU afterwards."""
        self.autoencoder.to(self.group.device)
        try:
            yield
        finally:
            self.autoencoder.to("cpu")
