"""Folders of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import archive
from pipeline.evaluate.images import open_images
from tests.pipeline.evaluate.sets import blobs


def save_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for number, image in enumerate(blobs(count, seed=0).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{number:06d}.png")


def test_batches_of_large_pictures_have_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(tmp_path / "pictures", 9)
    whole = [b.numpy() for b in open_images(str(tmp_path / "pictures"), "--samples").batches(9)]
    monkeypatch.setattr(archive, "MOST_BLOCK", 4 * 32 * 32 * 3)
    images = open_images(str(tmp_path / "pictures"), "--samples")
    found = [batch.numpy() for batch in images.batches(9)]
    assert [len(batch) for batch in found] == [4, 4, 1]
    np.testing.assert_array_equal(np.concatenate(found), whole[0])
