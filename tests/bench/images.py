"""Image crops to measure on: photographs of a folder, else cut-outs of scikit-learn's two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.datasets.crop import decode_crop
from schemas.errors import UserError

SAMPLE = Path(__file__).parents[3] / "shared/data/imagenet_sample"
SUFFIXES = {".jpeg", ".jpg", ".png"}


def load_crops(folder: str | None, count: int, resolution: int) -> tuple[Tensor, str]:
    """``count`` uint8 crops (B, 3, R, R), spread evenly over the images of ``folder``, and their
    description. Default: the sample of ImageNet beside the project where it exists, else cut-outs
    of scikit-learn's photographs. Raises ``UserError`` where ``folder`` has too few images."""
    root = SAMPLE if folder is None else Path(folder).expanduser()
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    if files:
        if len(files) < count:
            raise UserError(f"--images {root}: {len(files)} images, not {count}")
        chosen = [files[i * len(files) // count] for i in range(count)]
        crops = [decode_crop(path.read_bytes(), resolution) for path in chosen]
        return _stack(crops), f"{count} of {len(files)} images of {root.name}"
    if folder is not None:
        raise UserError(f"--images {folder}: the folder has no images")
    return _stack(_cutouts(count, resolution)), "cut-outs of scikit-learn's two photographs"


def _cutouts(count: int, resolution: int) -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    crops = []
    for number in range(count):
        photograph = photographs[number % 2]
        size = int(rng.integers(128, 401))
        top, left = (int(rng.integers(0, extent - size + 1)) for extent in photograph.shape[:2])
        part = Image.fromarray(photograph[top : top + size, left : left + size])
        crops.append(np.asarray(part.resize((resolution, resolution), Image.Resampling.BICUBIC)))
    return crops


def _stack(crops: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
