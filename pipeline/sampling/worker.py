"""One of several workers that draw images: a student and a decoder in their own process."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from pipeline.autoencoders import decode_scaled, open_decoder
from pipeline.checkpoints.resolve import local_copy
from pipeline.checkpoints.student import load_trained_student
from pipeline.hashing import sha256_of_module
from pipeline.precision import arithmetic, choose_arithmetic
from pipeline.sampling.batches import ImageBatch
from pipeline.sampling.generate import compile_student, draw_latents
from pipeline.sampling.prompts import (
    PromptEmbedder,
    Prompts,
    check_conditions,
    complete_student,
    describe_prompts,
    open_prompts,
)
from schemas.classes import ClassTable
from schemas.diffusion import Path as DiffusionPath
from schemas.diffusion import Prediction
from schemas.errors import UserError
from schemas.sample import Arithmetic, SampleConfig, SampledText


@dataclass(frozen=True)
class WorkerInfo:
    """Properties of a worker that determine the images: equal workers draw equal images."""

    step: int | None
    model: str
    classes: ClassTable
    weights_sha256: str
    path: DiffusionPath
    prediction: Prediction
    data_time: Literal[0, 1]
    autoencoder: str
    autoencoder_sha256: str
    image_size: int
    precision: Arithmetic
    device: Literal["cpu", "cuda"]
    text: SampledText | None = None
    """Captions, of a student that was trained on them."""
    compile: bool = False


@dataclass(frozen=True)
class SampledBatch:
    """The images of one batch."""

    batch: ImageBatch
    images: np.ndarray[Any, Any]
    """uint8 (B, R, R, 3)."""
    pngs: tuple[bytes, ...]
    """The images as PNG files; empty where the caller does not need them."""


class SampleWorker:
    """Draws batches of images; runs as a Ray actor."""

    embedder: PromptEmbedder | None = None
    """Captions, of a student that was trained on them."""

    def load(
        self,
        config: SampleConfig,
        checkpoint: str,
        device: Literal["cpu", "cuda"],
        threads: int,
        prompts: Prompts | None = None,
    ) -> WorkerInfo:
        """Load the checkpoint at a path or URL that ``find_checkpoint`` returned. ``prompts`` are
        those of the options, read where their file is; by default they are read here. Raises
        ``UserError``."""
        from pipeline.distributed.log_relay import set_up_worker_logging  # needs Ray

        set_up_worker_logging()
        torch.set_num_threads(threads)
        try:
            with local_copy(checkpoint, config.weights) as local:
                return self._load(config, str(local), device, prompts)
        except UserError as error:
            raise UserError(str(error)) from None  # subclasses may not survive pickling

    def draw(self, batch: ImageBatch, labels: list[int], *, pngs: bool) -> SampledBatch:
        """Draw the images of ``batch`` with one label each, or with their captions. Raises
        ``UserError`` where the latents are not finite, or where the GPU's memory does not
        suffice."""
        try:
            images = self._draw(batch, labels)
        except torch.OutOfMemoryError:
            raise UserError(
                f"a GPU has no memory for {batch.count} images at a time; use a smaller "
                f"--batch-size than {self.config.batch_size}"
            ) from None
        return SampledBatch(batch, images, tuple(map(_png, images)) if pngs else ())

    def _load(
        self,
        config: SampleConfig,
        checkpoint: str,
        device: Literal["cpu", "cuda"],
        prompts: Prompts | None,
    ) -> WorkerInfo:
        self.config = config
        self.precision = choose_arithmetic(config.precision, device)
        trained = load_trained_student(
            Path(checkpoint), config.weights, config.model, config.file_options
        )
        self.student = trained.student
        check_conditions(config, trained)
        weights = sha256_of_module(self.student)  # of the file, before its null caption is known
        text = None
        if trained.text_encoder is not None:
            prompts = prompts or open_prompts(config)
            assert prompts is not None
            assert config.num is not None
            self.embedder = PromptEmbedder(prompts, trained.text_encoder, config, device=device)
            complete_student(trained, self.embedder)
            text = describe_prompts(prompts, trained.text_encoder, config)
            known = text.encoder_sha256 or self.embedder.encoder_sha256
            truncated = self.embedder.truncated(config.num)
            text = text.model_copy(update={"encoder_sha256": known, "truncated": truncated})
        self.autoencoder = open_decoder(config.autoencoder, trained.encoder)
        self.student.to(device)
        self.autoencoder.to(device)
        if config.compile:
            compile_student(self.student)
        return WorkerInfo(
            step=trained.step,
            model=self.student.config.model,
            classes=trained.classes,
            weights_sha256=weights,
            path=self.student.convention.path,
            prediction=self.student.convention.prediction,
            data_time=self.student.convention.data_time,
            autoencoder=self.autoencoder.name,
            autoencoder_sha256=self.autoencoder.weights_sha256,
            image_size=self._image_size(device),
            precision=self.precision,
            device=device,
            text=text,
            compile=config.compile,
        )

    def _image_size(self, device: str) -> int:
        """Pixels per side of a decoded image."""
        shape = self.student.config.latent_shape
        blank = torch.zeros(1, *shape, device=device)
        return int(decode_scaled(self.autoencoder, blank).shape[-1])

    def _draw(self, batch: ImageBatch, labels: list[int]) -> np.ndarray[Any, Any]:
        latents = draw_latents(
            self.student,
            labels if self.embedder is None else self.embedder(range(batch.first, batch.last + 1)),
            self.config.sampler,
            first_index=batch.first,
            precision=self.precision,
        )
        if not latents.isfinite().all():
            raise UserError(
                f"latents of images {batch.first} to {batch.last} are not finite: has the training "
                f"diverged? (weights '{self.config.weights}', precision {self.precision})"
            )
        with arithmetic(self.precision):
            images = self.autoencoder.decode(latents).cpu()
        return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def _png(image_RR3: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_RR3).save(file, "PNG")
    return file.getvalue()
