"""Folders of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluate.images import sample_info
from pipeline.evaluate.images.sources import open_images
from pipeline.storage import npz
from schemas.errors import UserError
from tests.pipeline.evaluate.sets import about_samples, blobs


def save_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for number, image in enumerate(blobs(count, seed=0).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{number:06d}.png")


def test_batches_of_large_images_are_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_images(tmp_path / "pictures", 9)
    expected = [b.numpy() for b in open_images(str(tmp_path / "pictures"), "--samples").batches(9)]
    monkeypatch.setattr(npz, "MAX_BLOCK", 4 * 32 * 32 * 3)
    images = open_images(str(tmp_path / "pictures"), "--samples")
    found = [batch.numpy() for batch in images.batches(9)]
    assert [len(batch) for batch in found] == [4, 4, 1]
    np.testing.assert_array_equal(np.concatenate(found), expected[0])


@pytest.mark.parametrize("resolution", [None, 32])
def test_pixels_are_those_of_extraction(tmp_path: Path, resolution: int | None) -> None:
    """Greys of 12 bits are scaled; floats, whose range is not known, are refused."""
    ramp = np.linspace(0, 4095, 32 * 32).astype(np.uint16).reshape(32, 32)
    data = b"P5\n32 32\n4095\n" + ramp.astype(">u2").tobytes()
    (tmp_path / "ramp.pgm").write_bytes(data)
    (batch,) = open_images(str(tmp_path), "--samples", resolution=resolution).batches(1)
    assert np.abs(batch.numpy().astype(int) - (ramp >> 4)).max() <= 1
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "ramp.tif")
    with pytest.raises(UserError, match=r"ramp\.tif: has floating-point pixels"):
        list(open_images(str(tmp_path), "--samples", resolution=resolution).batches(2))


@pytest.mark.parametrize("known", [True, False])
def test_a_folder_has_a_description_of_its_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], known: bool
) -> None:
    """Other files are reported only where the description is not of ``jobs/sample.py``."""
    save_images(tmp_path / "pictures", 4)
    text = about_samples(num=4).model_dump_json() if known else '{"by": "another program"}'
    (tmp_path / "pictures" / "about.json").write_text(text)
    (tmp_path / "pictures" / "labels.npy").touch()
    images = open_images(str(tmp_path / "pictures"), "--samples")
    logged = capsys.readouterr().err
    if known:
        assert images.info == about_samples(num=4)
        assert logged == ""
    else:
        assert images.info is None
        assert "is ignored, because it is not one that jobs/sample.py writes" in logged
        assert "skipped 2 files that are not images" in logged


def test_large_descriptions_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(tmp_path / "pictures", 4)
    (tmp_path / "pictures" / "about.json").write_text(about_samples(num=4).model_dump_json())
    monkeypatch.setattr(sample_info, "MAX_ABOUT", 100)
    assert open_images(str(tmp_path / "pictures"), "--samples").info is None


@pytest.mark.parametrize("target", ["/nowhere.png", "/nowhere"])
def test_links_that_lead_nowhere_are_named(tmp_path: Path, target: str) -> None:
    save_images(tmp_path / "images", 3)
    (tmp_path / "images" / "link").symlink_to(target)
    with pytest.raises(UserError, match=r"--samples '.*': links that lead nowhere: link; "):
        open_images(str(tmp_path / "images"), "--samples")
