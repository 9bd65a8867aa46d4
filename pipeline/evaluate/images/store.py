"""The images that a store holds."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.autoencoders import Autoencoder, decode_means, open_decoder
from pipeline.store import Store, StreamReader
from schemas.errors import UserError
from schemas.sample import SampleAbout


class StoreImages:
    """The crops of an `image` stream, where a store has one, else what its autoencoder makes of the
    means of the latents; in the store's order, which is shuffled."""

    def __init__(
        self,
        url: str,
        *,
        limit: int | None = None,
        autoencoder: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """``autoencoder``: the decoder; default the one that encoded. Raises ``UserError``."""
        store = Store.open(url)
        self._store, self._device = store, device
        crops = [name for name, s in store.manifest.teacher_streams.items() if s.cut == "image"]
        self._reader = StreamReader(store, crops[0] if crops else "latents")
        store.require_complete(*crops[:1])
        self._samples = store.index().samples_per_shard
        total = sum(self._samples)
        self.count = total if limit is None else min(limit, total)
        self.about: SampleAbout | None = None
        self._vae: Autoencoder | None = None
        size = store.manifest.resolution
        if crops:
            self.kind = f"{size}x{size} crops of a store"
            return
        self._vae = open_decoder(autoencoder, store.manifest.autoencoder)
        self._vae.to(device)
        self.kind = f"{size}x{size} reconstructions of a store's latents by '{self._vae.name}'"
        print(
            f"store '{store.shown_url}' holds no crops: its latents (posterior means) are decoded, "
            "and reconstructions are not the originals",
            file=sys.stderr,
        )

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 (B, 3, R, R)."""
        every = (
            (shard, row) for shard, samples in enumerate(self._samples) for row in range(samples)
        )
        wanted = itertools.islice(every, self.count)
        while chosen := list(itertools.islice(wanted, size)):
            shards, rows = (np.array(numbers) for numbers in zip(*chosen, strict=True))
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
