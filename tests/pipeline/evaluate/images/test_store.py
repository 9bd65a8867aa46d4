from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.datasets import Listing, open_reader
from pipeline.datasets.crop import decode_crop
from pipeline.evaluate.images.sources import open_images
from pipeline.extract.encoder import Encoder
from pipeline.extract.tasks import make_manifest, make_tasks
from pipeline.store import Store
from pipeline.visualization.store_sample import decode_latent, read_latents
from schemas.extract import ExtractConfig


def test_crops_of_an_image_stream_are_used(
    digits_config: ExtractConfig, digits_listing: Listing, tmp_path: Path
) -> None:
    """Byte for byte, across shards."""
    config = digits_config.model_copy(update={"cut": "image", "store": str(tmp_path / "store")})
    encoder = Encoder(config, device="cpu", threads=1)
    manifest = make_manifest(config, digits_listing, encoder.describe())
    store = Store.create(str(config.store), manifest)
    for task in make_tasks(digits_listing, config.shard_size):
        encoder.encode_shard(store.url, manifest, task)
    store.finish()
    images = open_images(store.url, "--reference", limit=17)
    assert images.count == 17
    assert "crops" in images.kind
    found = np.concatenate([batch.permute(0, 2, 3, 1).numpy() for batch in images.batches(6)])
    read = open_reader(config)
    expected = [decode_crop(read(item), config.resolution) for item in digits_listing.items[:17]]
    np.testing.assert_array_equal(found, np.stack(expected))


def test_decoding_of_latents_is_reported(
    digits_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    images = open_images(digits_store.url, "--samples", limit=12)
    assert "reconstructions are not the originals" in capsys.readouterr().err
    assert "reconstructions" in images.kind
    found = np.concatenate([batch.permute(0, 2, 3, 1).numpy() for batch in images.batches(5)])
    assert len(found) == 12
    expected = decode_latent(digits_store, read_latents(digits_store, 1, 1)["mean"])
    assert np.abs(found[11].astype(int) - expected).max() <= 1  # another batch size
