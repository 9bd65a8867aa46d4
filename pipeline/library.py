"""A store in plain Python, for training loops and notebooks of one's own: ``open_store``.

    from pipeline import open_store

    store = open_store("runs/cats/store")
    print(len(store), store.classes, store.latent_shape)
    sample = store[0]                                  # key, label, latent (C, h, w)
    batches = store.batches(64, shuffle=True, layers=(9, 11))
    for epoch in range(10):
        batches.set_epoch(epoch)
        for batch in batches:
            loss = mine(batch.latents, batch.labels, batch.features, batch.attention)

``jobs/examples/plain_loop.py`` is a loop of another style that trains on a store.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.normalisation import normalisation_of, normalise
from pipeline.store import SampleOrder, Store, StreamReader
from pipeline.store.reading.batch_loader import rank_slice
from pipeline.targets.sources import TargetSource, Wanted, open_targets
from schemas.errors import UserError

if TYPE_CHECKING:
    from pipeline.autoencoders import Autoencoder

Rows = tuple[np.ndarray, np.ndarray]
"""Shards and rows of samples."""


class Sample(NamedTuple):
    """One image of a store."""

    key: str
    label: int
    latent: Tensor
    """(C, h, w) float32: the posterior's mean, normalised as a student sees it."""


class Targets(NamedTuple):
    """A teacher's targets of some samples."""

    features: Tensor | None
    """(B, N, D) float32 patch tokens of the teacher; None where they are not asked for."""
    attention: Tensor | None
    """(B, L, H, N, N) float32 probabilities of the layers, in their order; None without layers."""


class TrainingBatch(NamedTuple):
    """Samples of one step."""

    indices: np.ndarray
    """int64 (B,): places in the store."""
    latents: Tensor
    """(B, C, h, w) float32, drawn from the posterior and normalised as a student sees them."""
    labels: Tensor
    """int64 (B,)."""
    features: Tensor | None
    attention: Tensor | None
    """See ``Targets``."""


class OpenStore:
    """A complete store as a sequence of samples; ``batches`` iterates over it."""

    def __init__(self, store: Store) -> None:
        store.require_complete()
        manifest = store.manifest
        self.store = store
        self.classes: list[str] = list(manifest.dataset.classes.names)
        """Names in the order of the labels; empty where the data set has numbers only."""
        self.num_classes: int = manifest.dataset.num_classes
        self.latent_shape: tuple[int, int, int] = manifest.autoencoder.latent_shape
        self.image_size: int = manifest.resolution
        self.streams: list[str] = list(manifest.teacher_streams)
        """Names of the teacher streams."""
        self._sizes = np.asarray(store.index().samples_per_shard, np.int64)
        self._ends = np.cumsum(self._sizes)
        self._latents = StreamReader(store, "latents")
        self._normalisation = normalisation_of(manifest.autoencoder)
        self._decoder: Autoencoder | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Sample:
        """Raises ``IndexError``, so that a ``for`` loop over a store ends."""
        shards, rows = self._places([index])
        columns = self._latents.read(shards, rows)
        mean = normalise(torch.from_numpy(columns["mean"]).float(), self._normalisation)
        key = self.store.record(int(shards[0])).keys[int(rows[0])]
        return Sample(key, int(columns["label"][0]), mean[0])

    def targets(
        self,
        indices: Sequence[int],
        *,
        layers: Sequence[int] = (),
        features: bool = True,
        stream: str | None = None,
        device: torch.device | str = "cpu",
    ) -> Targets:
        """The teacher's targets of the samples: its features, and its attention in ``layers``
        (0-based). ``stream`` names one of ``streams`` where there are several. Raises ``UserError``
        for layers that the store lacks, and ``IndexError`` for samples that it lacks."""
        source = self._open_targets(layers, features, stream, torch.device(device))
        return _decode(source, StreamReader(self.store, source.stream), self._places(indices))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        layers: Sequence[int] = (),
        features: bool | None = None,
        stream: str | None = None,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        window: int = 8,
        prefetch: int = 2,
    ) -> Batches:
        """An iterator over one epoch at a time, as a ``DataLoader`` with a ``DistributedSampler``.

        ``batch_size`` samples for each process; ``rank`` and ``world_size`` are those of
        ``torch.distributed`` where it is initialised, else one process. ``shuffle`` mixes the
        samples of ``window`` shards at a time, in another order each epoch (``set_epoch``), the
        same for all ranks. Without ``drop_last`` the last batch is smaller; of several processes
        all have as many samples then, if need be some from the epoch's beginning. ``layers``,
        ``features`` (default: True where the store has a teacher stream) and ``stream`` are those
        of ``targets``. Raises ``UserError`` for layers that the store lacks.
        """
        initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank is None and world_size is None and initialised:
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        rank, world_size = rank or 0, world_size or 1
        if batch_size < 1 or not 0 <= rank < world_size:
            raise UserError(
                f"batches: batch_size {batch_size}, rank {rank} of {world_size}: batch_size is at "
                "least 1, and rank below world_size"
            )
        wanted = bool(self.streams) if features is None else features
        targets = None
        if wanted or layers:
            targets = self._open_targets(layers, wanted, stream, torch.device(device))
        order = SampleOrder(seed, self._sizes.tolist(), window) if shuffle else None
        return Batches(
            self, order, targets, batch_size, rank, world_size, seed, drop_last, prefetch, device
        )

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images (B, 3, R, R) of normalised latents (B, C, h, w), by the store's
        autoencoder, on the CPU. Raises ``UserError`` where that is not available."""
        from pipeline.autoencoders import decode_scaled, open_decoder  # diffusers takes seconds

        if self._decoder is None:
            self._decoder = open_decoder(None, self.store.manifest.autoencoder, option=None)
        return decode_scaled(self._decoder, latents)

    def _open_targets(
        self, layers: Sequence[int], features: bool, stream: str | None, device: torch.device
    ) -> TargetSource:
        name, held = self.store.manifest.teacher_stream(stream)
        missing = sorted(set(layers) - set(held.teacher.layers))
        if missing:
            raise UserError(
                f"stream '{name}' of {self.store.shown_url} lacks teacher layer {missing[0]}: it "
                f"has {', '.join(map(str, held.teacher.layers)) or 'none'}"
            )
        wanted = Wanted(features, tuple(layers), held.teacher.heads)
        return open_targets(self.store, name, wanted, device)

    def _places(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """Negative indices count from the end. Raises ``IndexError``."""
        given = np.asarray(indices, np.int64)
        found = np.where(given < 0, given + len(self), given)
        outside = given[(found < 0) | (found >= len(self))]
        if len(outside):
            raise IndexError(f"the store has samples 0 to {len(self) - 1}, not {outside[0]}")
        shards = np.searchsorted(self._ends, found, side="right")
        return shards, found - (self._ends[shards] - self._sizes[shards])

    def _index_of(self, places: Rows) -> np.ndarray:
        shards, rows = places
        return self._ends[shards] - self._sizes[shards] + rows


class Batches:
    """Batches of one epoch; iterating again gives the same ones until ``set_epoch``."""

    def __init__(
        self,
        store: OpenStore,
        order: SampleOrder | None,
        targets: TargetSource | None,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        drop_last: bool,
        prefetch: int,
        device: torch.device | str,
    ) -> None:
        self._store, self._order, self._targets = store, order, targets
        self._global = batch_size * world_size
        self._rank, self._world_size = rank, world_size
        self._seed, self._drop_last = seed, drop_last
        self._prefetch, self._device = max(1, prefetch), torch.device(device)
        self._reader = None if targets is None else StreamReader(store.store, targets.stream)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of an epoch, the same for all ranks."""
        size = len(self._store)
        return size // self._global if self._drop_last else -(-size // self._global)

    def __iter__(self) -> Iterator[TrainingBatch]:
        epoch = self.epoch
        with ThreadPoolExecutor(1, thread_name_prefix="open-store") as thread:
            waiting: deque[Future[tuple[Rows, Tensor, Tensor, dict[str, Tensor]]]] = deque()
            try:
                for step in range(len(self) + self._prefetch):
                    if step < len(self):
                        waiting.append(thread.submit(self._read, epoch, step))
                    if step >= self._prefetch and waiting:
                        yield self._batch(*waiting.popleft().result())
            finally:
                for future in waiting:
                    future.cancel()

    def _read(self, epoch: int, step: int) -> tuple[Rows, Tensor, Tensor, dict[str, Tensor]]:
        """Places, latents, labels and the stored arrays of the targets, on the CPU."""
        places = self._places_of(epoch, step)
        store = self._store
        columns = store._latents.read(*places)
        mean, std = (torch.from_numpy(columns[name]).float() for name in ("mean", "std"))
        noise = np.random.Generator(np.random.PCG64([self._seed, epoch, step, self._rank]))
        drawn = torch.from_numpy(noise.standard_normal(mean.shape, np.float32))
        latents = normalise(mean + std * drawn, store._normalisation)
        stored = {} if self._reader is None else self._reader.read(*places)
        tensors = {name: torch.from_numpy(array) for name, array in stored.items()}
        return places, latents, torch.from_numpy(columns["label"]), tensors

    def _batch(
        self, places: Rows, latents: Tensor, labels: Tensor, stored: dict[str, Tensor]
    ) -> TrainingBatch:
        device, features, attention = self._device, None, None
        if self._targets is not None:
            moved = {name: array.to(device, non_blocking=True) for name, array in stored.items()}
            features, attention = self._targets(moved)
        return TrainingBatch(
            self._store._index_of(places),
            latents.to(device),
            labels.to(device),
            features,
            attention,
        )

    def _places_of(self, epoch: int, step: int) -> Rows:
        size = len(self._store)
        begin, end = step * self._global, min((step + 1) * self._global, size)
        # as many for each rank: samples from the epoch's beginning fill the last batch up
        count = -(-(end - begin) // self._world_size) * self._world_size
        own = slice(*rank_slice(count, self._rank, self._world_size))
        positions = (begin + np.arange(count))[own] % size
        if self._order is None:
            return self._store._places(positions)
        return self._order.locate(epoch * size + positions)


def open_store(url: str) -> OpenStore:
    """The store at a path or URL, as ``pipeline.extract`` wrote it. Raises ``UserError`` where
    there is none, or shards are missing. See this module for an example."""
    return OpenStore(Store.open(url))


def _decode(source: TargetSource, reader: StreamReader, places: Rows) -> Targets:
    columns = reader.read(*places)
    return Targets(*source({name: torch.from_numpy(array) for name, array in columns.items()}))
