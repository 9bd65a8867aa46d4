"""The caption of each visit of a sample, and the rows of a stream of captions that it needs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.randomness import Purpose, generator
from pipeline.store.captions import load_null
from pipeline.store.codecs import decode_column
from pipeline.store.reading.stream_reader import StreamReader
from pipeline.store.store import Store
from schemas.store import caption_column

DROP = 0.1
"""Share of visits without a caption: p_uncond of U-ViT (arXiv 2209.12152), REPA and HASTE."""


class CaptionChoice(NamedTuple):
    """Captions of B visits."""

    number: np.ndarray
    """int64 (B,): caption of the image, from 0."""
    dropped: np.ndarray
    """bool (B,): the null caption takes its place."""


def choose_captions(
    seed: int,
    epochs: np.ndarray,
    samples: np.ndarray,
    counts: np.ndarray,
    *,
    drop: float = DROP,
) -> CaptionChoice:
    """The caption of each of B visits: uniform among the ``counts`` (B,) of its image, and dropped
    with probability ``drop``, the caption being drawn first as U-ViT's loader does.

    A pure function of seed, epoch and sample, whatever process or batch the visit is in.
    ``samples`` are numbers that stay those of a sample: shard * shard_size + row. Raises
    ``ValueError`` for an image without captions or a drop that is not a probability.
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"{drop} is not a probability")
    if (np.asarray(counts) < 1).any():
        raise ValueError("an image has no caption")
    places = zip(np.asarray(epochs).tolist(), np.asarray(samples).tolist(), strict=True)
    draws = [generator(Purpose.CAPTION, seed, *place).random(2) for place in places]
    uniform = np.array(draws).reshape(-1, 2)
    number = (uniform[:, 0] * counts).astype(np.int64)
    return CaptionChoice(np.minimum(number, np.asarray(counts) - 1), uniform[:, 1] < drop)


class Captions(NamedTuple):
    """Captions of B visits, as the student gets them."""

    values: Tensor
    """Embeddings float32 (B, T, D), or token ids int64 (B, T)."""
    choice: CaptionChoice


class CaptionReader:
    """Reads of each visit's sample the chosen caption and no other; of dropped ones nothing."""

    def __init__(
        self, store: Store, stream: str | None = None, *, seed: int = 0, drop: float = DROP
    ) -> None:
        """Raises ``UserError`` for a store without captions, or with a damaged null caption."""
        self.store = store
        self.seed, self.drop = seed, drop
        self.stream, self.info = store.manifest.text_stream(stream)
        kind = "embeddings" if self.info.keeps == "embeddings" else "tokens"
        self.null = load_null(store, self.stream)[kind]
        first = StreamReader(store, self.stream, columns=[caption_column(0)])
        others = (
            StreamReader(store, self.stream, columns=[caption_column(n)], source=first.source)
            for n in range(1, self.info.captions)
        )
        self._readers = [first, *others]

    def counts(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Captions of samples, int64 (B,), by the commit records alone."""
        places = zip(shards.tolist(), rows.tolist(), strict=True)
        records = (self.store.record(shard, self.stream) for shard in shards.tolist())
        found = [
            record.captions[self.stream].counts[row]
            for record, (_, row) in zip(records, places, strict=True)
        ]
        return np.array(found, np.int64)

    def read(self, shards: np.ndarray, rows: np.ndarray, epochs: np.ndarray) -> Captions:
        """The captions of visits of the samples ``(shards[i], rows[i])`` in ``epochs[i]``."""
        samples = shards * self.store.manifest.shard_size + rows
        counts = self.counts(shards, rows)
        choice = choose_captions(self.seed, epochs, samples, counts, drop=self.drop)
        values = self.null.expand(len(rows), *self.null.shape).clone()
        for number, reader in enumerate(self._readers):
            places = np.flatnonzero((choice.number == number) & ~choice.dropped)
            if len(places):
                arrays = reader.read(shards[places], rows[places])
                parts = {name: torch.from_numpy(array) for name, array in arrays.items()}
                name = caption_column(number)
                decoded = decode_column(name, self.info.columns[name], parts)
                values[torch.from_numpy(places)] = decoded.to(values.dtype)
        return Captions(values, choice)

    def close(self) -> None:
        """Free cached bytes. The reader must not be used afterwards."""
        for reader in self._readers:
            reader.close()
