"""Sources of captions: a text encoder, or embeddings in the files of the data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.datasets import ImageItem, open_reader
from pipeline.datasets.coco_features import NULL
from pipeline.datasets.crop import BadImageError
from pipeline.datasets.reader import UNREADABLE
from pipeline.datasets.stored_latents import parse_array
from pipeline.extract.captions import keeps_captions, text_stream_name
from pipeline.storage.files import redact
from pipeline.store.captions import describe_null, padded_texts
from pipeline.store.codecs import encode_column
from pipeline.text_encoders import TextEncoder
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.fields import TEXT
from schemas.networks import TextEncoderInfo, WeightsFile
from schemas.streams import LENGTHS, TextStream, caption_column

Rows = list[Sequence[np.ndarray]]
"""Result of ``read`` for each image of a batch."""


class CaptionSource(Protocol):
    """Provides the captions of a batch of images."""

    info: TextEncoderInfo
    null: bytes
    """The null caption as bytes of a safetensors file."""

    def read(self, item: ImageItem) -> Sequence[np.ndarray]:
        """Stored embeddings of one image, empty if the source computes them; called in the decoding
        threads. Raises ``BadImageError``."""

    def values(self, items: Sequence[ImageItem], stored: Rows) -> tuple[list[Tensor], np.ndarray]:
        """Embeddings (n, T, D) or token ids (n, T) of each image, and the tokens of all captions
        before truncation, int64, one after the other."""


def open_captions(config: ExtractConfig, device: torch.device) -> CaptionSource | None:
    """The source of captions, None where none are stored. Raises ``UserError``."""
    if not keeps_captions(config):
        return None
    if config.dataset == "coco256_features":
        return StoredCaptions(config)
    return EncodedCaptions(config, device)


def text_arrays(
    source: CaptionSource, stream: TextStream, items: Sequence[ImageItem], stored: Rows
) -> dict[str, Tensor]:
    """The stored arrays of a batch's captions by name, (B, ...)."""
    values, lengths = source.values(items, stored)
    counts = [len(captions) for captions in values]
    table = np.zeros((len(items), stream.captions), np.int64)
    table[np.arange(stream.captions) < np.array(counts)[:, None]] = lengths
    arrays: dict[str, Tensor] = {LENGTHS: torch.from_numpy(table)}
    for number in range(stream.captions):
        name = caption_column(number)
        absent = torch.zeros_like(values[0][0])
        chosen = [v[number] if number < len(v) else absent for v in values]
        arrays |= encode_column(name, stream.columns[name], torch.stack(chosen))
    if TEXT in stream.columns:
        (size,) = stream.columns[TEXT].shape
        rows = np.stack([padded_texts(item.captions, size) for item in items])
        arrays[TEXT] = torch.from_numpy(rows)
    return arrays


class EncodedCaptions:
    """Encodes captions, or only tokenises them."""

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        self.encoder = TextEncoder(config.text).to(device)
        self.batch_size = config.batch_size
        self.info = self.encoder.info()
        tokens = self.encoder.tokenizer([""])
        tensors: dict[str, Any] = {"tokens": torch.from_numpy(tokens.ids[0])}
        if self.encoder.model is not None:
            tensors["embeddings"] = self.encoder.encode(tokens)[0].cpu().contiguous()
        self.null = save(tensors)

    def read(self, item: ImageItem) -> Sequence[np.ndarray]:
        return ()

    def values(self, items: Sequence[ImageItem], stored: Rows) -> tuple[list[Tensor], np.ndarray]:
        tokens = self.encoder.tokenizer([text for item in items for text in item.captions])
        encoded = torch.from_numpy(tokens.ids)
        if self.encoder.model is not None:
            ids, mask = (np.array_split(a, self._cuts(len(a))) for a in tokens[:2])
            batches = zip(ids, mask, strict=True)
            encoded = torch.cat(
                [self.encoder.encode(tokens._replace(ids=i, mask=m)) for i, m in batches]
            )
        return list(encoded.split([len(item.captions) for item in items])), tokens.lengths

    def _cuts(self, count: int) -> list[int]:
        return list(range(self.batch_size, count, self.batch_size))


class StoredCaptions:
    """Reads embeddings of captions as U-ViT's and HASTE's scripts write them; ``--text.encoder``
    names their encoder, which is not loaded."""

    def __init__(self, config: ExtractConfig) -> None:
        if config.text.keep == "tokens":
            raise UserError(
                "--text.keep tokens: --dataset coco256_features has embeddings of captions, and "
                "neither texts nor tokens"
            )
        self._read_file = open_reader(config)
        self._shown = redact(config.source or "")
        null = self._null()
        self.info = TextEncoderInfo(
            encoder=config.text.encoder,
            weights="source",
            seed=0,
            model_args={},
            weights_sha256=None,
            tokenizer=config.text.encoder,
            tokenizer_sha256=None,
            tokens=null.shape[0],
            width=null.shape[1],
        )
        self.null = save({"embeddings": torch.from_numpy(null)})

    def read(self, item: ImageItem) -> Sequence[np.ndarray]:
        return [self._context(item, path) for path in item.contexts]

    def values(self, items: Sequence[ImageItem], stored: Rows) -> tuple[list[Tensor], np.ndarray]:
        values = [torch.from_numpy(np.stack(contexts)) for contexts in stored]
        # the number of tokens is not known; all positions of an embedding are used
        return values, np.full(sum(map(len, values)), self.info.tokens, np.int64)

    def _context(self, item: ImageItem, path: str) -> np.ndarray:
        try:
            context = parse_array(self._read_file(item._replace(path=path)))
        except UNREADABLE as error:
            raise BadImageError(f"{path}: {error.strerror or type(error).__name__}") from None
        except BadImageError as error:
            raise BadImageError(f"{path}: {error}") from None
        expected = (self.info.tokens, self.info.width)
        if context.shape != expected:
            raise BadImageError(f"{path}: has shape {context.shape}; {NULL} has {expected}")
        return context

    def _null(self) -> np.ndarray:
        where = f"--source '{self._shown}': {NULL}"
        try:
            null = parse_array(self._read_file(ImageItem("", 0, NULL)))
        except (BadImageError, *UNREADABLE) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{where}, the embedding of the empty caption: {reason}") from None
        if null.ndim != 2 or min(null.shape) < 1:
            raise UserError(f"{where} has shape {null.shape}; expected (tokens, width)")
        return null


def describe_captions(config: ExtractConfig, source: CaptionSource) -> WeightsFile:
    """Entry of a manifest for the null caption."""
    return describe_null(source.null, text_stream_name(config))
