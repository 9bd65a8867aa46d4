"""Fixtures of extractions, through Ray or without it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.encoded import LocalPool


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of six flat pictures."""
    folder = tmp_path / "images"
    for number in range(12):
        path = folder / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 48), (20 * number, 90, 255 - 20 * number)).save(path)
    return folder


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extractions in this process: an actor's start takes as long as ten of them."""
    pytest.importorskip("ray", reason="ray is not installed")
    one = SimpleNamespace(count=1, threads=1, gpus=0)
    distributed = "pipeline.distributed"
    monkeypatch.setattr("pipeline.extract.encoder_pool.EncoderPool", LocalPool)
    monkeypatch.setattr(f"{distributed}.ray_cluster.ray_cluster", lambda _: nullcontext())
    monkeypatch.setattr(f"{distributed}.resources.choose_resources", lambda *_, **__: one)
