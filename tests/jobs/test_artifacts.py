"""Images of an experiment: its classes are those of its store."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.experiments.artifacts import read_images, unpack
from pipeline.datasets.folder import list_class_folders
from schemas.errors import UserError


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_zip(path: Path, *names: str) -> str:
    with zipfile.ZipFile(path, "w") as zipped:
        for number, name in enumerate(names):
            zipped.writestr(name, b"" if name.endswith("/") else png(number))
    return str(path)


def test_labels_are_those_of_the_store(tmp_path: Path) -> None:
    names = [f"train/{name}/{n}.png" for name in ("b", "a", "c") for n in (2, 1, 3)]
    source = write_zip(tmp_path / "x.zip", *names, "train/a/.DS_Store", "train/list.txt")
    assert unpack(source, 1, tmp_path / "out") == {"classes": 3, "images": 9}
    images = read_images(tmp_path / "out" / "train", 32)
    listing = list_class_folders(str(tmp_path / "out" / "train"))
    assert images.labels.tolist() == [item.label for item in listing.items] == [0, 0, 1, 1, 2, 2]
    for pixels, item in zip(images.pixels, listing.items, strict=True):
        stored = Image.open(tmp_path / "out" / "train" / item.path)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(stored))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("train/b/", r"found 3 classes, the smallest of 0 \(b\)"),
        ("train/b/.DS_Store", r"more than 1 images of each class"),
        ("train/a/deep/4.png", r"'train/a/deep/4.png' is in a folder inside a class"),
    ],
)
def test_classes_without_images_and_nested_folders_are_refused(
    tmp_path: Path, extra: str, message: str
) -> None:
    names = [f"train/{name}/{n}.png" for name in ("a", "c") for n in (1, 2)]
    source = write_zip(tmp_path / "x.zip", *names, extra)
    with pytest.raises(UserError, match=message):
        unpack(source, 1, tmp_path / "out")


def test_a_class_that_was_emptied_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.png").write_bytes(png(0))
    with pytest.raises(UserError, match="no images in class folder 'a'"):
        read_images(tmp_path, 32)
