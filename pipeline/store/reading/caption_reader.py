"""The caption of each visit of a sample, and the rows of a stream of captions that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.randomness import Purpose, uniform_pairs
from pipeline.store.arrays import Allocate, allocate
from pipeline.store.captions import load_null
from pipeline.store.codecs import Decoder, decoder_of
from pipeline.store.errors import DamagedShardError
from pipeline.store.reading.alternatives import AlternativesReader
from pipeline.store.reading.file_source import FileSource
from pipeline.store.reading.memory_cache import SharedCache
from pipeline.store.reading.row_request import Columns, ShardRows
from pipeline.store.store import Store
from schemas.errors import UserError
from schemas.streams import LENGTHS, TextStream, caption_column

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
    uniform = uniform_pairs(Purpose.CAPTION, seed, np.asarray(epochs), np.asarray(samples))
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
        columns = [caption_column(number) for number in range(self.info.captions)]
        if len({self.info.columns[name].codec for name in columns}) > 1:
            raise UserError(
                f"captions of stream '{self.stream}' of {store.shown_url} are of several codecs: "
                "convert the store to one"
            )
        shared = [LENGTHS] if self.info.keeps == "tokens" else []
        # The captions of a sample lie together in a tar, and in a file each in a zarr store.
        equal = all(self.info.columns[name] == self.info.columns[columns[0]] for name in columns)
        apart = store.manifest.format == "zarr" or not equal
        self._readers: list[AlternativesReader] = []
        for some in ([name] for name in columns) if apart else [columns]:
            reader = AlternativesReader(
                store,
                self.stream,
                some,
                CAPTION,
                shared=shared,
                verify=verify,
                whole_file_limit=whole_file_limit,
                source=source,
                allocate=allocate,
            )
            self._readers.append(reader)
            source = reader.source
        self._first = self._readers[0]
        self._decode = caption_decoder(self.info)
        self._choices: SharedCache[CaptionChoice] = SharedCache()

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
        """Captions of samples, int64 (B,), by the commit records alone. Raises
        ``DamagedShardError``."""
        counts = np.empty(len(rows), np.int64)
        for shard in set(shards.tolist()):
            of, held = shards == shard, self._counts(shard)
            self._check_rows(shard, rows[of], held)
            counts[of] = held[rows[of]]
        return counts

    def empty(self, count: int) -> Columns:
        """Arrays for ``count`` visits, for ``fill``. Raises ``UserError`` when memory cannot hold
        them."""
        out = self._first.empty(count)
        if out.pop(LENGTHS, None) is not None:
            out[LENGTH] = np.zeros(count, np.int64)
        out[DROPPED] = np.zeros(count, bool)
        return out

    def split_into_tasks(self, groups: Sequence[ShardRows]) -> Iterator[Sequence[ShardRows]]:
        """See ``StreamReader``."""
        return self._first.split_into_tasks(groups)

    def fill(self, out: Columns, groups: Sequence[ShardRows]) -> None:
        """Read the captions of visits into their places of ``out``. Raises what
        ``StreamReader.fill`` raises."""
        assert self._epochs_of is not None
        chosen = []
        for group in groups:
            epochs = self._epochs_of(group.start + group.places)
            for epoch in set(epochs.tolist()):  # nearly always one
                of = epochs == epoch
                part = group._replace(rows=group.rows[of], places=group.places[of])
                every = self._choose_shard(part, epoch)
                choice = CaptionChoice(every.number[part.rows], every.dropped[part.rows])
                chosen.append((part, choice))
        self._fill(out, chosen)

    def columns(self, shards: np.ndarray, rows: np.ndarray, epochs: np.ndarray) -> Columns:
        """The arrays that ``fill`` makes, for visits of the samples ``(shards[i], rows[i])`` in
        ``epochs[i]``."""
        return self._columns(shards, rows, self.choose(shards, rows, epochs))

    def choose(self, shards: np.ndarray, rows: np.ndarray, epochs: np.ndarray) -> CaptionChoice:
        """The captions of these visits."""
        samples = shards * self.store.manifest.shard_size + rows
        counts = self.counts(shards, rows)
        return choose_captions(self.seed, epochs, samples, counts, drop=self.drop)

    def read(self, shards: np.ndarray, rows: np.ndarray, epochs: np.ndarray) -> Captions:
        """The captions of visits of the samples ``(shards[i], rows[i])`` in ``epochs[i]``."""
        import torch  # takes seconds, and drivers need the choice alone

        choice = self.choose(shards, rows, epochs)
        columns = self._columns(shards, rows, choice)
        parts = {name: torch.from_numpy(array) for name, array in columns.items()}
        dropped = parts[DROPPED].view(-1, *[1] * self.null.dim())
        return Captions(
            torch.where(dropped, self.null, self._decode(parts).to(self.null.dtype)), choice
        )

    def expire(self, position: int) -> None:
        """Free cached bytes that are needed only before ``position`` of the run."""
        for reader in self._readers:
            reader.expire(position)
        self._choices.expire(position)

    def close(self) -> None:
        """Free cached bytes. The reader must not be used afterwards."""
        for reader in self._readers:
            reader.close()
        self._choices.clear()

    def _counts(self, shard: int) -> np.ndarray:
        """Captions of all samples of a shard."""
        counts = np.array(self._first.record(shard).captions[self.stream].counts, np.int64)
        if counts.max(initial=0) > self.info.captions:
            raise DamagedShardError(
                f"{self._where(shard)}: its record lists more than {self.info.captions} captions "
                "of an image"
            )
        return counts

    def _check_rows(self, shard: int, rows: np.ndarray, held: np.ndarray) -> None:
        if rows.max() >= len(held):
            raise DamagedShardError(
                f"{self._where(shard)} has captions of {len(held)} samples, not {rows.max() + 1}: "
                "run the extraction again"
            )

    def _choose_shard(self, group: ShardRows, epoch: int) -> CaptionChoice:
        """The captions of all samples of a group's shard in an epoch: as fast as those of a few."""

        def choose() -> CaptionChoice:
            counts = self._counts(group.shard)
            samples = group.shard * self.store.manifest.shard_size + np.arange(len(counts))
            epochs = np.full(len(counts), epoch)
            return choose_captions(self.seed, epochs, samples, counts, drop=self.drop)

        key = f"{group.shard}/{epoch}"
        choice = self._choices.get(key, choose, expires_at=group.expires_at)
        assert choice is not None  # this cache has no byte limit
        self._check_rows(group.shard, group.rows, choice.number)
        return choice

    def _columns(self, shards: np.ndarray, rows: np.ndarray, choice: CaptionChoice) -> Columns:
        out = self.empty(len(rows))
        chosen = []
        for shard in set(shards.tolist()):
            places = np.flatnonzero(shards == shard)
            places = places[np.argsort(rows[places])]
            of_shard = CaptionChoice(choice.number[places], choice.dropped[places])
            chosen.append((ShardRows(shard, rows[places], places), of_shard))
        self._fill(out, chosen)
        return out

    def _fill(self, out: Columns, chosen: Sequence[tuple[ShardRows, CaptionChoice]]) -> None:
        """The captions of visits, those of one shard with one request where its format allows."""
        found = dict(out)
        if LENGTH in out:
            found[LENGTHS] = np.zeros((len(out[LENGTH]), self.info.captions), np.int64)
        wanted: list[list[ShardRows]] = [[] for _ in self._readers]
        for group, (number, dropped) in chosen:
            out[DROPPED][group.places] = dropped
            if dropped.any():
                for name in self._decode.names.values():  # nothing else is written there
                    out[name][group.places[dropped]] = 0
            held = len(self._first.columns)
            file, column = np.divmod(number, held)
            for wanted_of, groups in enumerate(wanted):
                of = ~dropped & (file == wanted_of)
                if of.any():
                    rows = group.rows[of] * held + column[of]
                    groups.append(group._replace(rows=rows, places=group.places[of]))
        for groups, reader in zip(wanted, self._readers, strict=True):
            if groups:
                reader.fill(found, groups)
        if LENGTH in out:
            for group, (number, _) in chosen:
                out[LENGTH][group.places] = found[LENGTHS][group.places, number]

    def _where(self, shard: int) -> str:
        return f"stream '{self.stream}', shard {shard} of {self.store.shown_url}"
