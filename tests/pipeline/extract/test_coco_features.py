"""MS-COCO's folders of U-ViT's and HASTE's scripts as a source."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.datasets import list_images
from pipeline.extract.encoder import Encoder
from pipeline.extract.hints import log_hints
from pipeline.extract.tasks import make_manifest, make_tasks
from pipeline.store import Store, StreamReader
from pipeline.store.captions import load_null
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig
from tests.captions import extract_here

COUNTS = (2, 1, 3)
SHAPE = (8, 8, 8)


def write_features(root: Path, split: str = "train") -> Path:
    """Three images of 32 px with COUNTS captions, 5 x 6 each; log variances from -40 to 4."""
    rng = np.random.default_rng(0)
    folder = root / split
    folder.mkdir(parents=True)
    for number, count in enumerate(COUNTS):
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        moments = rng.standard_normal(SHAPE).astype(np.float32)
        moments[4:] = rng.uniform(-40, 4, (4, 8, 8))
        np.save(folder / f"{number}.npy", moments)
        for k in range(count):
            np.save(folder / f"{number}_{k}.npy", rng.standard_normal((5, 6)).astype(np.float32))
    np.save(root / "empty_context.npy", rng.standard_normal((5, 6)).astype(np.float32))
    return root


def config_of(source: Path, store: Path, **changes: object) -> ExtractConfig:
    values = {
        **PRESETS["demo"],
        "dataset": "coco256_features",
        "source": str(source),
        "store": str(store),
        "shard_size": 2,
        "text": {"keep": "embeddings", "codec": "float32"},
        **changes,
    }
    return ExtractConfig.model_validate(values)


def read(store: Store, stream: str) -> dict[str, np.ndarray]:
    return StreamReader(store, stream).read(np.array([0, 0, 1]), np.array([0, 1, 0]))


def test_latents_and_embeddings_are_those_of_the_files(tmp_path: Path) -> None:
    source = write_features(tmp_path / "coco256_features")
    store = extract_here(config_of(source, tmp_path / "store"))
    latents, text = read(store, "latents"), read(store, "text")
    for number, count in enumerate(COUNTS):
        moments = np.load(source / "train" / f"{number}.npy")
        std = np.exp(np.clip(moments[4:].astype(np.float64), -30, 20) / 2)
        np.testing.assert_array_equal(latents["mean"][number], moments[:4])
        np.testing.assert_allclose(latents["std"][number], std, rtol=1e-6)
        for k in range(3):
            expected = np.zeros((5, 6), np.float32)
            if k < count:
                expected = np.load(source / "train" / f"{number}_{k}.npy")
            np.testing.assert_array_equal(text[f"caption{k}"][number], expected)
    assert "text" not in text
    assert store.record(0).captions["text"].counts == [2, 1]
    null = torch.from_numpy(np.load(source / "empty_context.npy"))
    assert torch.equal(load_null(store, "text")["embeddings"], null)
    assert store.manifest.text_streams["text"].encoder.weights_sha256 is None
    assert (store.manifest.dataset.split, store.manifest.dataset.dummy_class) == ("train", True)


def test_a_warning_says_that_the_pictures_are_clipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(write_features(tmp_path / "s"), tmp_path / "store")
    encoder = Encoder(config, device="cpu", threads=1)
    with caplog.at_level(logging.WARNING):
        log_hints(config, list_images(config), encoder.describe())
    assert "all below middle grey is black" in caplog.text


@pytest.mark.parametrize(
    ("remove", "reason"),
    [
        ("train/1.npy", r"train/1\.npy is missing"),
        ("train/2.png", r"train/2\.png is missing"),
        ("train/2_1.npy", r"train/2_1\.npy is missing"),
        ("train/1_0.npy", r"train/1_0\.npy is missing"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, remove: str, reason: str) -> None:
    source = write_features(tmp_path / "s")
    (source / remove).unlink()
    with pytest.raises(UserError, match=reason):
        list_images(config_of(source, tmp_path / "store"))


def test_a_missing_split_or_null_caption_is_named(tmp_path: Path) -> None:
    source = write_features(tmp_path / "s")
    with pytest.raises(UserError, match=r"val"):
        list_images(config_of(source, tmp_path / "store", split="val"))
    (source / "empty_context.npy").unlink()
    with pytest.raises(UserError, match=r"empty_context\.npy, the embedding of the empty caption"):
        Encoder(config_of(source, tmp_path / "store"), device="cpu", threads=1)
    tokens = config_of(source, tmp_path / "store", text={"keep": "tokens"})
    with pytest.raises(UserError, match="has embeddings of captions, and neither"):
        Encoder(tokens, device="cpu", threads=1)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((5, 7), np.float32), r"1_0\.npy: has shape \(5, 7\)"),
        (np.full((5, 6), np.nan, np.float32), r"1_0\.npy: a value is not finite"),
        (np.zeros((5, 6), np.int32), r"1_0\.npy: holds int32"),
    ],
)
def test_a_damaged_embedding_is_a_bad_image(tmp_path: Path, array: np.ndarray, reason: str) -> None:
    source = write_features(tmp_path / "s")
    np.save(source / "train" / "1_0.npy", array)
    config = config_of(source, tmp_path / "store", on_bad_image="skip")
    encoder, listing = Encoder(config, device="cpu", threads=1), list_images(config)
    manifest = make_manifest(config, listing, encoder.describe())
    store = Store.create(str(config.store), manifest)
    results = [encoder.encode_shard(store.url, manifest, t) for t in make_tasks(listing, 2)]
    (bad,) = results[0].bad_images
    assert bad.key == "1"
    assert re.search(reason, bad.error)
    assert store.record(0).captions["text"].counts == [2]
