"""Grids of images: names of rows, and files that are whole or absent."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.visualization.image_grid import save_grid

GREY = torch.full((1, 3, 96, 96), 128, dtype=torch.uint8)


def drawn(folder: Path, name: str) -> np.ndarray:
    save_grid(GREY, folder / "a.png", 1, row_names=[name])
    with Image.open(folder / "a.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    margin = pixels[:, : -GREY.shape[-1] - 4]
    columns = np.flatnonzero((margin < 128).any(0))
    assert columns[0] > 0  # the whole name is on the picture
    assert columns[-1] < margin.shape[1] - 1
    return margin


def test_names_have_the_letters_of_other_languages(tmp_path: Path) -> None:
    """Letters that the font lacks would all be the same box."""
    words = ["\u00fc", "\u00f6", "\u00e9", "\u0142", "\u0416", "\u03a9"]
    pictures = [drawn(tmp_path, word * 3) for word in words]
    assert len({picture.tobytes() for picture in pictures}) == len(words)
    apart = unicodedata.normalize("NFD", "K\u00fche")  # as macOS writes names of files
    assert np.array_equal(drawn(tmp_path, apart), drawn(tmp_path, "K\u00fche"))
    drawn(tmp_path, "W" * 30)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_file_is_whole_or_as_before(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"before")

    def stopped(self: Image.Image, file: object, *_: object, **__: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            save_grid(GREY, tmp_path / name, 1)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"before"
    save_grid(GREY, tmp_path / name, 1)
    with Image.open(tmp_path / name) as picture:
        assert picture.size == (100, 100)
