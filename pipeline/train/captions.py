"""Text embeddings of a batch, the input of a student that reads captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.store import Store, StreamReader
from pipeline.store.captions import load_null
from pipeline.store.reading.caption_reader import (
    CAPTION,
    DROPPED,
    LENGTH,
    CaptionReader,
    caption_decoder,
)
from schemas.errors import UserError
from schemas.networks import TextEncoderInfo

if TYPE_CHECKING:
    from pipeline.text_encoders import TextEncoder


class CaptionInput:
    """Makes the text embeddings of a batch on the training device: decodes them, or runs the text
    encoder on token ids."""

    def __init__(self, store: Store, stream: str | None, device: torch.device) -> None:
        """Raises ``UserError`` for a store without captions, and where the text encoder of a stream
        of token ids cannot be loaded or is not the one that made them."""
        self.stream, info = store.manifest.text_stream(stream)
        self.encoder_info = info.encoder
        """The encoder, with the hash of the weights that are in use."""
        self._decode = caption_decoder(info)
        self.encoder: TextEncoder | None = None
        """The encoder of token ids, on the training device; None of embeddings."""
        null = load_null(store, self.stream)
        if info.keeps == "tokens":
            self.encoder = _load_encoder(info.encoder, null["tokens"], self.stream)
            self.encoder_info = self.encoder.info()
            self.null = self.encoder([""])[0].to(device)
            self.encoder.to(device)
        else:
            self.null = null["embeddings"].float().to(device)
        """float32 (T, E): the embedding of the empty caption."""

    def check(self, columns: Mapping[str, np.ndarray]) -> None:
        """Raises ``UserError`` for token ids that the encoder does not have, because an index out
        of range ends a process on a GPU."""
        if self.encoder is None:
            return
        ids = columns[CAPTION]
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= self.encoder.vocabulary:
            raise UserError(
                f"stream '{self.stream}' of the store holds a token outside the "
                f"{self.encoder.vocabulary} of '{self.encoder_info.encoder}': it is damaged"
            )

    def __call__(self, columns: Mapping[str, Tensor]) -> Tensor:
        """float32 (B, T, E) from the arrays of ``CaptionReader`` (B, ...): the embeddings of each
        visit's caption, of the empty one where it is dropped."""
        values = self._decode(columns)
        if self.encoder is not None:
            places = torch.arange(values.shape[1], device=values.device)
            values = self.encoder.embed(values, places < columns[LENGTH].unsqueeze(1))
        return torch.where(columns[DROPPED].view(-1, 1, 1), self.null, values.float())


def _load_encoder(info: TextEncoderInfo, null_T: Tensor, stream: str) -> TextEncoder:
    """The encoder of a stream of token ids, on the CPU. Raises ``UserError``."""
    # here, because they take seconds to import
    from pipeline.text_encoders import TextEncoder
    from pipeline.text_encoders.recorded import recorded_config

    encoder = TextEncoder(recorded_config(info))
    ids = encoder.tokenizer([""]).ids[0]
    same = encoder.tokenizer.sha256() == info.tokenizer_sha256
    if not same or not np.array_equal(ids, null_T.numpy()):
        raise UserError(
            f"stream '{stream}' holds tokens of another version of the tokenizer "
            f"'{info.tokenizer}' than this machine has: extract it again, or use the same files"
        )
    return encoder


class SampleReader:
    """Reads single samples of several streams, which are scattered: a whole file is never fetched
    for one."""

    def __init__(
        self,
        store: Store,
        streams: Iterable[str],
        captions: CaptionInput | None,
        *,
        seed: int,
        drop: float,
    ) -> None:
        """``captions``: those of the training, whose stream is read as ``CaptionReader`` says."""
        self._readers = {
            name: CaptionReader(store, name, seed=seed, drop=drop, whole_file_limit=0)
            if captions is not None and name == captions.stream
            else StreamReader(store, name, whole_file_limit=0)
            for name in dict.fromkeys(streams)
        }

    def read(
        self, shards: np.ndarray, rows: np.ndarray, epochs: np.ndarray
    ) -> dict[str, dict[str, np.ndarray]]:
        """Arrays (B, ...) of each stream. ``epochs``: those of the visits, which choose captions.
        Raises ``DamagedShardError``."""
        return {
            name: dict(
                reader.columns(shards, rows, epochs)
                if isinstance(reader, CaptionReader)
                else reader.read(shards, rows)
            )
            for name, reader in self._readers.items()
        }

    def close(self) -> dict[str, int]:
        """Close the files. Returns the bytes that were read of each stream."""
        for reader in self._readers.values():
            reader.close()
        return {name: reader.bytes_read for name, reader in self._readers.items()}
