"""Hints before an extraction about few tokens, small latents and small images."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.datasets import list_images
from pipeline.extract.hints import log_hints
from pipeline.extract.tasks import Description
from schemas.extract import ExtractConfig
from schemas.store import Manifest
from tests.stores import random_manifest


def logged(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    *,
    side: int,
    resolution: int,
    grid: int,
    latent: int,
) -> list[str]:
    """Warnings for pictures of ``side`` pixels and a teacher with ``grid`` tokens of 14 pixels."""
    (folder / "a").mkdir(exist_ok=True)
    for number in range(3):
        image = np.full((side, side + 9, 3), number, np.uint8)
        Image.fromarray(image).save(folder / "a" / f"{number}.png")
    (folder / "a" / "broken.png").write_text("no image")
    manifest: Manifest = random_manifest(6, 3)
    stream = manifest.teacher_streams["maps"]
    sizes = {"grid": (grid, grid), "image_size": 14 * grid}
    description = Description(
        stream.teacher.model_copy(update={**sizes, "weights": "hub"}),
        manifest.autoencoder.model_copy(update={"latent_shape": (4, latent, latent)}),
        stream.compute,
    )
    config = ExtractConfig(dataset="folder", source=str(folder), resolution=resolution)
    caplog.clear()
    log_hints(config, list_images(config), description)
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_small_images_few_tokens_and_small_latents(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    assert logged(tmp_path, caplog, side=32, resolution=32, grid=2, latent=4) == [
        "the teacher sees 28 px as 2x2 tokens, which is few; --teacher.image-size 224 gives 16x16",
        "latents have 4x4 numbers per channel, which is few; a larger --resolution than 32 gives "
        "more",
    ]
    assert logged(tmp_path, caplog, side=32, resolution=256, grid=16, latent=32) == [
        "3 of 3 examined images are smaller than --resolution 256 (the smallest has 32 px) and "
        "will be enlarged"
    ]
    assert logged(tmp_path, caplog, side=256, resolution=256, grid=16, latent=32) == []
