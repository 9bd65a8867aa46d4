"""The caption of each visit of a sample, and the rows of a stream of captions that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.randomness import Purpose, generator
from pipeline.store.arrays import Allocate, allocate
from pipeline.store.captions import load_null
from pipeline.store.codecs import Decoder, column_arrays, decoder_of
from pipeline.store.errors import DamagedShardError
from pipeline.store.reading.file_source import FileSource
from pipeline.store.reading.row_request import Columns, ShardRows
from pipeline.store.reading.stream_reader import StreamReader
from pipeline.store.store import Store
from schemas.errors import UserError
from schemas.store import LENGTHS, TextStream, caption_column

if TYPE_CHECKING:
    from torch import Tensor

CAPTION, DROPPED, LENGTH = "caption", "dropped", "length"
"""Arrays of a batch of visits: the stored arrays of each visit's caption, under the names of a
column 'caption'; bool (B,), True where the null caption takes its place; of a stream of token ids
the tokens of each caption, int64 (B,)."""

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


Epochs = Callable[[np.ndarray], np.ndarray]
"""Epoch of each position of a run, int64 (B,) -> int64 (B,)."""


def caption_decoder(info: TextStream) -> Decoder:
    """The decoder of the captions in a batch of ``CaptionReader``."""
    return decoder_of(CAPTION, info.columns[caption_column(0)])


class CaptionReader:
    """Reads of each visit's sample the chosen caption and no other; of dropped ones nothing.

    It has the methods of a ``StreamReader`` that the loader uses. ``fill`` is safe to call from
    several threads, ``read`` is not.
    """

    def __init__(
        self,
        store: Store,
        stream: str | None = None,
        *,
        seed: int = 0,
        drop: float = DROP,
        epochs_of: Epochs | None = None,
        verify: bool = True,
        whole_file_limit: int = 8 << 20,
        source: FileSource | None = None,
        allocate: Allocate = allocate,
    ) -> None:
        """``epochs_of`` is of use to ``fill`` only; ``whole_file_limit``, ``source`` and
        ``allocate`` as in ``StreamReader``. Raises ``UserError`` for a store without captions, or
        with a damaged null caption."""
        self.store = store
        self.seed, self.drop = seed, drop
        self.stream, self.info = store.manifest.text_stream(stream)
        kind = "embeddings" if self.info.keeps == "embeddings" else "tokens"
        self.null = load_null(store, self.stream)[kind]
        self._epochs_of = epochs_of
        self._allocate = allocate
        columns = [caption_column(number) for number in range(self.info.captions)]
        if len({self.info.columns[name].codec for name in columns}) > 1:
            raise UserError(
                f"captions of stream '{self.stream}' of {store.shown_url} are of several codecs: "
                "convert the store to one"
            )
        if self.info.keeps == "tokens":
            columns.append(LENGTHS)
        self._readers: dict[str, StreamReader] = {}
        for name in columns:
            self._readers[name] = StreamReader(
                store,
                self.stream,
                columns=[name],
                verify=verify,
                whole_file_limit=whole_file_limit,
                source=source,
                allocate=allocate,
            )
            source = self._readers[name].source
        self._first = self._readers[columns[0]]
        self._arrays = {  # of each caption's column, in one order
            name: column_arrays(name, self.info.columns[name]) for name in columns
        }
        self._decode = caption_decoder(self.info)

    @property
    def source(self) -> FileSource:
        """The files, which all captions share."""
        return self._first.source

    @property
    def opens(self) -> int:
        """Requests to storage so far."""
        return self.source.opens

    @property
    def bytes_read(self) -> int:
        """Bytes received from storage so far."""
        return self.source.bytes_read

    def counts(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Captions of samples, int64 (B,), by the commit records alone."""
        places = zip(shards.tolist(), rows.tolist(), strict=True)
        return np.array([self._counts(shard)[row] for shard, row in places], np.int64)

    def empty(self, count: int) -> Columns:
        """Arrays for ``count`` visits, for ``fill``. Raises ``UserError`` when memory cannot hold
        them."""
        first = self._first.empty(count)
        names = zip(self._decode.names.values(), self._arrays[caption_column(0)], strict=True)
        out = {name: first[array] for name, array in names}
        out[DROPPED] = np.zeros(count, bool)
        if LENGTHS in self._readers:
            out[LENGTH] = np.zeros(count, np.int64)
        return out

    def split_into_tasks(self, groups: Sequence[ShardRows]) -> Iterator[Sequence[ShardRows]]:
        """See ``StreamReader``."""
        return self._first.split_into_tasks(groups)

    def fill(self, out: Columns, groups: Sequence[ShardRows]) -> None:
        """Read the captions of visits into their places of ``out``. Raises what
        ``StreamReader.fill`` raises."""
        assert self._epochs_of is not None
        for group in groups:
            self._fill(out, group, self._epochs_of(group.start + group.places))

    def columns(self, shards: np.ndarray, rows: np.ndarray, epochs: np.ndarray) -> Columns:
        """Columns as of ``fill``, for visits of the samples ``(shards[i], rows[i])`` in
        ``epochs[i]``."""
        out = self.empty(len(rows))
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            places = places[np.argsort(rows[places])]
            self._fill(out, ShardRows(shard, rows[places], places), epochs[places])
        return out

    def read(self, shards: np.ndarray, rows: np.ndarray, epochs: np.ndarray) -> Captions:
        """The captions of visits of the samples ``(shards[i], rows[i])`` in ``epochs[i]``."""
        import torch  # takes seconds, and drivers need the choice alone

        samples = shards * self.store.manifest.shard_size + rows
        counts = self.counts(shards, rows)
        choice = choose_captions(self.seed, epochs, samples, counts, drop=self.drop)
        columns = self.columns(shards, rows, epochs)
        parts = {name: torch.from_numpy(array) for name, array in columns.items()}
        dropped = parts[DROPPED].view(-1, *[1] * self.null.dim())
        return Captions(
            torch.where(dropped, self.null, self._decode(parts).to(self.null.dtype)), choice
        )

    def expire(self, position: int) -> None:
        """Free cached bytes that are needed only before ``position`` of the run."""
        for reader in self._readers.values():
            reader.expire(position)

    def close(self) -> None:
        """Free cached bytes. The reader must not be used afterwards."""
        for reader in self._readers.values():
            reader.close()

    def _counts(self, shard: int) -> list[int]:
        return self._first.record(shard).captions[self.stream].counts

    def _fill(self, out: Columns, group: ShardRows, epochs: np.ndarray) -> None:
        """The captions of one shard's visits, those of each number with one request."""
        shard, rows, places = group.shard, group.rows, group.places
        held = self._counts(shard)
        if rows.max() >= len(held):
            raise DamagedShardError(
                f"stream '{self.stream}', shard {shard} of {self.store.shown_url} has captions of "
                f"{len(held)} samples, not {rows.max() + 1}: run the extraction again"
            )
        counts = np.array(held, np.int64)[rows]
        samples = shard * self.store.manifest.shard_size + rows
        number, dropped = choose_captions(self.seed, epochs, samples, counts, drop=self.drop)
        out[DROPPED][places] = dropped
        for name in self._decode.names.values():  # of dropped visits nothing else is written
            out[name][places[dropped]] = 0
        for chosen in np.unique(number[~dropped]).tolist():
            if chosen >= self.info.captions:
                raise DamagedShardError(
                    f"stream '{self.stream}', shard {shard} of {self.store.shown_url}: its record "
                    f"lists more than {self.info.captions} captions of an image"
                )
            of = (number == chosen) & ~dropped
            wanted = group._replace(rows=rows[of], places=places[of])
            name = caption_column(chosen)
            arrays = zip(self._arrays[name], self._decode.names.values(), strict=True)
            self._readers[name].fill({array: out[own] for array, own in arrays}, [wanted])
        kept = np.flatnonzero(~dropped)
        if LENGTHS in self._readers and len(kept):
            lengths = self._readers[LENGTHS].empty(len(kept))
            wanted = group._replace(rows=rows[kept], places=np.arange(len(kept)))
            self._readers[LENGTHS].fill(lengths, [wanted])
            out[LENGTH][places[kept]] = lengths[LENGTHS][np.arange(len(kept)), number[kept]]
