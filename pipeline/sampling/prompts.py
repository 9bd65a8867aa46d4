"""Captions of the images to draw, and their embeddings.

The caption of image i is a pure function of i and the seed, as is its noise: any split of the
images into batches or workers draws the same ones.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoints.student import LoadedStudent
from pipeline.models import MMDiT
from pipeline.sampling.captions_file import Alternatives, read_captions
from pipeline.sampling.generate import Context, check_guidance, check_sampler
from pipeline.sampling.options import PROMPTS
from pipeline.storage.files import redact
from pipeline.store import Store, StreamReader
from pipeline.store.captions import unpack_texts
from pipeline.store.reading.caption_reader import CaptionReader, choose_captions
from pipeline.text import shortened
from pipeline.text_encoders import TextEncoder
from pipeline.text_encoders.recorded import check_same_encoder, open_recorded
from schemas.errors import UserError, plain_text
from schemas.fields import TEXT
from schemas.networks import TextEncoderInfo
from schemas.sample import SampleConfig, SampledText

logger = logging.getLogger(__name__)


class Prompts(Protocol):
    """Captions by the numbers of images. Methods raise ``UserError``."""

    @property
    def count(self) -> int:
        """Images before captions repeat."""

    @property
    def shown(self) -> str:
        """Their source, for display."""

    @property
    def stored_as(self) -> str | None:
        """Codec of embeddings that ``embeddings`` reads; None where an encoder computes them."""

    def texts(self, numbers: Sequence[int]) -> list[str]:
        """The caption of each image."""

    def sha256(self, images: int) -> str:
        """Digest that is equal for equal captions of the first ``images`` images."""

    def embeddings(self, numbers: Sequence[int]) -> Tensor:
        """Float32 (B, T, E) of the captions, where they are stored."""


@dataclass(frozen=True)
class GivenPrompts:
    """Captions of options or of a file, for each image one of its alternatives at random."""

    images: Sequence[Alternatives]
    seed: int
    shown: str
    stored_as: str | None = None

    @property
    def count(self) -> int:
        return len(self.images)

    def texts(self, numbers: Sequence[int]) -> list[str]:
        epochs, places = np.divmod(np.array(numbers), self.count)
        rows = [self.images[place] for place in places.tolist()]
        counts = np.array([len(row) for row in rows])
        chosen = choose_captions(self.seed, epochs, places, counts, drop=0).number.tolist()
        return [row[k] for row, k in zip(rows, chosen, strict=True)]

    def sha256(self, images: int) -> str:
        texts = self.texts(range(images))
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()

    def embeddings(self, numbers: Sequence[int]) -> Tensor:
        raise NotImplementedError  # an encoder computes them: ``stored_as`` is None


class StoredPrompts:
    """For image i a random caption of sample i of a store, in the store's order."""

    def __init__(self, url: str, seed: int, stream: str | None = None) -> None:
        """Raises ``UserError`` for a store that is incomplete or has no captions."""
        self._store = store = Store.open(url)
        try:
            self.stream, self.info = store.manifest.text_stream(stream)
        except UserError as error:
            hint = "--text.stream"
            reason = str(error).replace("--diffusion.text-stream", hint)
            raise UserError(f"--store '{store.shown_url}': {reason} ({hint})") from None
        store.require_complete(self.stream)
        self._samples = np.cumsum([0, *store.index().samples_per_shard])
        self.count = int(self._samples[-1])
        if not self.count:
            raise UserError(f"--store '{store.shown_url}' holds no samples")
        self.shown = store.shown_url
        embeds = self.info.keeps == "embeddings"
        self.stored_as = self.info.columns["caption0"].codec if embeds else None
        self.seed = seed
        self._captions = CaptionReader(store, self.stream, seed=seed, drop=0)
        self.null = self._captions.null
        has_texts = TEXT in self.info.columns
        self._texts = StreamReader(store, self.stream, columns=[TEXT]) if has_texts else None

    def texts(self, numbers: Sequence[int]) -> list[str]:
        """Captions; where the store holds no texts, the keys of their images."""
        shards, rows, epochs = self._places(numbers)
        counts = self._captions.counts(shards, rows)
        samples = shards * self._store.manifest.shard_size + rows
        chosen = choose_captions(self.seed, epochs, samples, counts, drop=0).number.tolist()
        if self._texts is None:
            records = (self._store.record(shard) for shard in shards.tolist())
            keys = [record.keys[row] for record, row in zip(records, rows.tolist(), strict=True)]
            return [f"{key}, caption {k}" for key, k in zip(keys, chosen, strict=True)]
        packed = self._texts.read(shards, rows)[TEXT]
        return [unpack_texts(row)[k] for row, k in zip(packed, chosen, strict=True)]

    def sha256(self, images: int) -> str:
        """Digest of all captions of the store and the seed, so that no caption is read."""
        return hashlib.sha256(f"{self.info.captions_sha256} {self.seed}".encode()).hexdigest()

    def embeddings(self, numbers: Sequence[int]) -> Tensor:
        return self._captions.read(*self._places(numbers)).values

    def _places(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shards and rows of images, and how often all samples were drawn before."""
        epochs, samples = np.divmod(np.array(numbers), self.count)
        shards = np.searchsorted(self._samples, samples, side="right") - 1
        return shards, samples - self._samples[shards], epochs


class PromptEmbedder:
    """Embeddings of the captions of images, as a student was trained on them."""

    def __init__(
        self,
        prompts: Prompts,
        trained: TextEncoderInfo,
        config: SampleConfig,
        *,
        device: torch.device | str = "cpu",
        encoder: TextEncoder | None = None,
    ) -> None:
        """``trained`` is the encoder of the student's training data. It is loaded, unless it is
        given as ``encoder``, only if a caption or the negative prompt must be encoded. Raises
        ``UserError``, also where the embeddings in a store are of another encoder."""
        self.prompts = prompts
        self._encoder = None
        if isinstance(prompts, StoredPrompts):
            check_same_encoder(trained, prompts.info.encoder, f"--store '{prompts.shown}'")
        negative = config.negative_prompt
        if prompts.stored_as is None or negative is not None:
            self._encoder = encoder or open_recorded(trained, config.text, device=device)
        self._null: Tensor | None = None
        if negative is not None and self._encoder is not None:
            self._null = self._encoder([negative])[0]

    def __call__(self, numbers: Sequence[int]) -> Context:
        """The condition of images; stored embeddings are on the CPU."""
        if self.prompts.stored_as is not None:
            captions = self.prompts.embeddings(numbers)
        else:
            assert self._encoder is not None
            captions = self._encoder(self.prompts.texts(numbers))
        return Context(captions, self._null)

    @property
    def encoder_sha256(self) -> str | None:
        """Digest of the encoder's weights; None where captions are not encoded here."""
        return None if self._encoder is None else self._encoder.weights_sha256

    def null_caption(self) -> Tensor:
        """float32 (T, E): the embedding of the empty caption, of the store or by the encoder."""
        if isinstance(self.prompts, StoredPrompts) and self.prompts.stored_as is not None:
            return self.prompts.null.float()
        assert self._encoder is not None
        return self._encoder([""])[0]

    def truncated(self, images: int) -> int | None:
        """Number of the first ``images`` images whose caption is longer than the encoder's input;
        logged with the first of them. None where embeddings are stored, because the extraction
        counts them."""
        if self.prompts.stored_as is not None:
            return None
        assert self._encoder is not None
        texts, tokenizer = self.prompts.texts(range(images)), self._encoder.tokenizer
        longer = np.flatnonzero(tokenizer(texts).lengths > tokenizer.max_tokens)
        if len(longer):
            logger.warning(
                "%s: %d of %d captions were truncated to %d tokens, first: %s",
                self.prompts.shown,
                len(longer),
                images,
                tokenizer.max_tokens,
                shortened(plain_text(texts[longer[0]]), 80),
            )
        return len(longer)


def open_prompts(config: SampleConfig) -> Prompts | None:
    """The captions that the options name; None without such options. Raises ``UserError``."""
    seed = config.sampler.seed
    if config.store is not None:
        return StoredPrompts(config.store, seed, config.text.stream)
    if config.captions is not None:
        return GivenPrompts(read_captions(config.captions), seed, redact(config.captions))
    if config.caption is not None:
        return GivenPrompts([(caption,) for caption in config.caption], seed, "--caption")
    return None


def check_conditions(config: SampleConfig, trained: LoadedStudent) -> None:
    """Raises ``UserError`` where a student cannot be drawn from as the options ask: a student of
    classes with captions, one of captions without, or by a sampler that does not suit it."""
    student, captions = trained.student, trained.text_encoder is not None
    model = student.config.model
    given = next((key for key in PROMPTS if getattr(config, key) is not None), None)
    if given is not None and not captions:
        raise UserError(
            f"--{given}: {model} was trained on classes and reads no captions: use --classes"
        )
    if captions and given is None:
        raise UserError(
            f"{model} was trained on captions: give --caption TEXT, --captions FILE or --store "
            "VALIDATION_STORE in place of classes"
        )
    check_sampler(student.config, config.sampler)
    null = student.null_label if config.negative_prompt is None else 0
    check_guidance(null, config.sampler, option="--sampler.guidance")


def complete_student(trained: LoadedStudent, embedder: PromptEmbedder) -> None:
    """Give the student the null caption where its file lacks it."""
    if trained.lacks_null:
        assert isinstance(trained.student, MMDiT)
        trained.student.null_context.copy_(embedder.null_caption())


def describe_prompts(
    prompts: Prompts, trained: TextEncoderInfo, config: SampleConfig
) -> SampledText:
    """Identity of the captions of ``config.num`` images."""
    assert config.num is not None
    return SampledText(
        captions=prompts.shown,
        captions_sha256=prompts.sha256(config.num),
        stored_as=prompts.stored_as,
        encoder=trained.encoder,
        encoder_sha256=trained.weights_sha256,
        negative_prompt=config.negative_prompt,
    )
