"""Inputs of the student on the device, from batches on the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.alignment.aligned_student import ClassToken
from pipeline.diffusion.normalisation import normalisation_of, normalise
from pipeline.diffusion.objective import Objective
from pipeline.diffusion.times import times_of
from pipeline.store import Batch
from pipeline.targets.class_token import ClassTokens
from pipeline.train.captions import CaptionInput
from pipeline.train.device_transfer import DevicePrefetcher
from pipeline.train.noise import NoisePrefetcher, SampleNoise
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.store import Manifest


class Inputs(NamedTuple):
    """Inputs and target of the student for B samples, made by its objective."""

    noisy: Tensor
    """(B, C, h, w) noisy latents."""
    time: Tensor
    """(B,) time that the network receives."""
    condition: Tensor
    """(B,) classes, ``num_classes`` where the label was dropped; or text embeddings (B, T, E),
    those of the empty caption where the caption was dropped."""
    target: Tensor
    """(B, C, h, w) the denoising target."""
    class_token: ClassToken | None = None
    """None for a student without a class token."""


class Uploaded(NamedTuple):
    """Stored arrays and draws of B samples, on the device."""

    columns: dict[str, dict[str, Tensor]]
    """Arrays (B, ...) of each stream."""
    draws: SampleNoise


class InputBuilder:
    """Builds inputs in both phases: draws noise, copies to the device, decodes and corrupts."""

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        device: torch.device,
        objective: Objective,
        class_tokens: ClassTokens | None,
        captions: CaptionInput | None,
    ) -> None:
        """``objective``: the student's, on the device. ``class_tokens``: None for a student without
        them; ``captions``: None for other students than MMDiT."""
        self.class_tokens = class_tokens
        self.captions = captions
        self.feed = DevicePrefetcher(device)
        self.draws = NoisePrefetcher(
            config.seed,
            config.student.latent_shape,
            config.diffusion.label_drop,
            device,
            partial(times_of, config.diffusion),
            class_token=config.student.class_token,
        )
        self._config = config
        self._manifest = manifest
        self._objective = objective

    @property
    def streams(self) -> list[str]:
        """Names of the streams that inputs are built from."""
        sources = (self.class_tokens, self.captions)
        return ["latents", *(source.stream for source in sources if source is not None)]

    def __call__(
        self, batch: Batch, draws: SampleNoise | None = None, *, time: float | None = None
    ) -> Inputs:
        """Inputs of a batch. ``draws`` are made if not given; ``time`` replaces the drawn times."""
        draws = draws or self.draws(batch.positions)
        return self.build(self.upload(batch, draws, self.streams), time)

    def micro_batches(self, batch: Batch) -> list[tuple[Batch, SampleNoise]]:
        """Parts of a step's batch of at most ``workers.micro_batch`` samples, and their draws.
        Those of the next step begin to be drawn."""
        draws = self.draws(batch.positions)
        self.draws.expect(batch.positions + self._config.global_batch)
        return list(split_batch(batch, draws, self._config.workers.micro_batch))

    def upload(self, batch: Batch, draws: SampleNoise, streams: Iterable[str]) -> Uploaded:
        """Start to copy ``streams`` of a batch and its draws to the device. Raises ``UserError``
        for labels and tokens that the networks do not have."""
        stored = batch.columns["latents"]
        classes = self._manifest.dataset.num_classes
        if stored["label"].min(initial=0) < 0 or stored["label"].max(initial=0) >= classes:
            raise UserError(  # an index out of range ends a process on a GPU
                f"the store holds a label outside its {classes} classes: it is damaged"
            )
        if self.captions is not None:
            self.captions.check(batch.columns[self.captions.stream])
        columns = self.upload_columns(batch, streams)
        given = {k: values for k, values in draws._asdict().items() if values is not None}
        return Uploaded(columns, SampleNoise(**self.feed(given)))

    def upload_columns(self, batch: Batch, streams: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Start to copy ``streams`` of a batch to the device."""
        return {
            stream: self.feed(
                {name: torch.from_numpy(array) for name, array in batch.columns[stream].items()}
            )
            for stream in streams
        }

    def build(self, uploaded: Uploaded, time: float | None = None) -> Inputs:
        """Inputs of an uploaded batch, as from a call."""
        columns, drawn = uploaded.columns["latents"], uploaded.draws
        latents = columns["mean"].float() + columns["std"].float() * drawn.posterior
        latents = normalise(latents, normalisation_of(self._manifest.autoencoder))
        if self.captions is None:
            condition = torch.where(
                drawn.drop_label, self._config.student.num_classes, columns["label"]
            )
        else:
            condition = self.captions(uploaded.columns[self.captions.stream])
        t = drawn.t
        if time is not None:
            t = torch.full_like(t, time)
        noisy, network_time, target = self._objective.corrupt(latents, drawn.noise, t)
        return Inputs(noisy, network_time, condition, target, self._class_token(uploaded, t))

    def _class_token(self, uploaded: Uploaded, t_B: Tensor) -> ClassToken | None:
        """Class tokens at the times of the latents, unscaled, with noise of their own (REG)."""
        if self.class_tokens is None:
            return None
        noise = uploaded.draws.class_noise
        assert noise is not None
        clean = self.class_tokens(uploaded.columns[self.class_tokens.stream])
        noisy, _, target = self._objective.corrupt(clean, noise, t_B)
        return ClassToken(noisy, target, clean)


def split_batch(
    batch: Batch, draws: SampleNoise, size: int | None
) -> Iterator[tuple[Batch, SampleNoise]]:
    """Split a batch and its draws into parts of at most ``size`` samples; None: one part."""
    count = len(batch.positions)
    size = max(1, count) if size is None else size
    for begin in range(0, max(1, count), size):
        part = slice(begin, begin + size)
        columns = {
            stream: {name: array[part] for name, array in arrays.items()}
            for stream, arrays in batch.columns.items()
        }
        yield (
            Batch(batch.step, batch.positions[part], columns),
            draws.each(itemgetter(part)),
        )
