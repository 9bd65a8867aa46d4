"""Source images of stored samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.datasets import list_images, open_reader
from pipeline.datasets.crop import BadImageError, decode_crop
from pipeline.datasets.listing import describe_image
from pipeline.storage.files import absolute_url, redact
from pipeline.store import Store, StreamReader
from schemas.errors import UserError
from schemas.extract import ExtractConfig


class SourceImages:
    """Crops of a store's samples: those of a stream of cut ``image``, else from the data set."""

    def __init__(self, store: Store, source: str | None = None) -> None:
        """``source`` replaces the one that the manifest names. Raises ``UserError`` if neither has
        images."""
        self._store = store
        self._resolution = store.manifest.resolution
        cuts = {name: stream.cut for name, stream in store.manifest.teacher_streams.items()}
        stored = [name for name, cut in cuts.items() if cut == "image"]
        self._crops: StreamReader | None = None
        if stored and source is None:
            self._crops = StreamReader(store, stored[0])
            return
        dataset = store.manifest.dataset
        location = source or dataset.source
        if location is None and dataset.name != "demo":
            raise UserError(
                f"--source is missing: store '{store.shown_url}' does not name its images"
            )
        config = ExtractConfig.model_validate(
            {
                "dataset": dataset.name,
                "source": None if location is None else absolute_url(location),
                "resolution": self._resolution,
                "split": dataset.split,
                "captions": dataset.captions_from,
                "allow_empty_classes": True,
            }
        )
        self._items = {item.key: item for item in list_images(config, dataset.class_names).items}
        self._read = open_reader(config)
        self._shown = redact(location or "its package")

    def __call__(self, shards: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        """uint8 (B, R, R, 3). Raises ``UserError`` naming a missing or unreadable image."""
        if self._crops is not None:
            return self._crops.read(np.asarray(shards), np.asarray(rows))["crop"]
        keys = [
            self._store.record(shard).keys[row] for shard, row in zip(shards, rows, strict=True)
        ]
        return np.stack([self._crop(key) for key in keys])

    def _crop(self, key: str) -> np.ndarray:
        item = self._items.get(key)
        if item is None:
            raise UserError(f"--source '{self._shown}' has no image '{key}', which is in the store")
        try:
            stored, crop = item.latent is not None, self._store.manifest.crop
            return decode_crop(self._read(item), self._resolution, cropped=stored, crop=crop)
        except (BadImageError, OSError) as error:
            place = describe_image(self._store.manifest.dataset.name, item.key, item.path)
            raise UserError(f"--source '{self._shown}': {place}: {error}") from None
