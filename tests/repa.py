"""Folders in the format of REPA's and HASTE's dataset_tools.py."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def image_name(number: int) -> str:
    return f"{number // 1000:05d}/img{number:08d}.png"


def latent_name(number: int) -> str:
    return f"{number // 1000:05d}/img-mean-std-{number:08d}.npy"


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_repa(
    root: Path, crops: Sequence[np.ndarray], moments: Sequence[np.ndarray], labels: Sequence[int]
) -> Path:
    """Write uint8 (R, R, 3) crops and float32 (2C, h, w) means and stds; returns ``root``."""
    for folder, name in (("images", image_name), ("vae-sd", latent_name)):
        for number, (crop, array) in enumerate(zip(crops, moments, strict=True)):
            path = root / folder / name(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            if folder == "images":
                Image.fromarray(crop).save(path, compress_level=0)
            else:
                path.write_bytes(npy(array))
        entries = [[name(number), label] for number, label in enumerate(labels)]
        write_labels(root, folder, entries)
    return root


def write_labels(root: Path, folder: str, entries: object) -> None:
    path = root / folder / "dataset.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"labels": entries}))


def random_repa(root: Path, count: int = 6) -> Path:
    """Noise images of 32 px with latents of 4 x 8 x 8, in two classes."""
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    mean = rng.standard_normal((count, 4, 8, 8))
    std = np.abs(rng.standard_normal((count, 4, 8, 8))) / 10
    moments = np.concatenate([mean, std], 1).astype(np.float32)
    return write_repa(root, list(crops), list(moments), [i % 2 for i in range(count)])
