"""Images of a store."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.autoencoders import Autoencoder, decode_means, open_decoder
from pipeline.store import Store, StreamReader
from pipeline.store.captions import unpack_texts
from schemas.errors import UserError
from schemas.fields import TEXT
from schemas.sample import SampleAbout

logger = logging.getLogger(__name__)


class StoreImages:
    """The crops of a store's `image` stream; without one, reconstructions by the autoencoder from
    the means of the latents. In the store's order, which is shuffled."""

    def __init__(
        self,
        url: str,
        *,
        limit: int | None = None,
        autoencoder: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """``autoencoder`` is the decoder, by default the encoder of the store. Raises
        ``UserError``."""
        store = Store.open(url)
        self._store, self._device = store, device
        crops = [name for name, s in store.manifest.teacher_streams.items() if s.cut == "image"]
        self._reader = StreamReader(store, crops[0] if crops else "latents")
        store.require_complete(*crops[:1])
        self._samples = store.index().samples_per_shard
        total = sum(self._samples)
        self.count = total if limit is None else min(limit, total)
        self.info: SampleAbout | None = None
        self._vae: Autoencoder | None = None
        size = store.manifest.resolution
        if crops:
            self.kind = f"{size}x{size} crops of a store"
            return
        self._vae = open_decoder(autoencoder, store.manifest.autoencoder)
        self._vae.to(device)
        self.kind = f"{size}x{size} reconstructions of a store's latents by '{self._vae.name}'"
        logger.warning(
            "store '%s' holds no crops: its latents (posterior means) are decoded, and "
            "reconstructions are not the originals",
            store.shown_url,
        )

    def captions(self) -> Sequence[str] | None:
        """The first caption of each image."""
        streams = self._store.manifest.text_streams.items()
        name = next((name for name, stream in streams if TEXT in stream.columns), None)
        if name is None:
            return None
        reader = StreamReader(self._store, name, columns=[TEXT])
        parts = (reader.read(*places)[TEXT] for places in self._places(1024))
        return [unpack_texts(row)[0] for part in parts for row in part]

    def _places(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Shards and rows of the images, ``size`` at a time."""
        positions = (
            (shard, row) for shard, samples in enumerate(self._samples) for row in range(samples)
        )
        selected = itertools.islice(positions, self.count)
        while batch := list(itertools.islice(selected, size)):
            shards, rows = (np.array(numbers) for numbers in zip(*batch, strict=True))
            yield shards, rows

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 (B, 3, R, R)."""
        for shards, rows in self._places(size):
            stored = self._reader.read(shards, rows)
            if self._vae is None:
                yield torch.from_numpy(stored["crop"]).permute(0, 3, 1, 2)
            else:
                yield self._decode(self._vae, torch.from_numpy(stored["mean"]))

    def _decode(self, vae: Autoencoder, mean_BChw: Tensor) -> Tensor:
        try:
            return decode_means(vae, self._store.manifest.autoencoder, mean_BChw)
        except UserError as error:
            raise UserError(f"{self._store.shown_url}: {error}") from None
