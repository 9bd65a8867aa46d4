"""Fixtures of extractions through Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of six flat pictures."""
    folder = tmp_path / "images"
    for number in range(12):
        path = folder / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 48), (20 * number, 90, 255 - 20 * number)).save(path)
    return folder
