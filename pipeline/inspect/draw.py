"""One sample of a store as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch

from pipeline.autoencoders import Autoencoder
from pipeline.store import Store, StreamReader
from schemas.errors import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

QUERIES = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.75))  # rows and columns, as shares of the grid


def find_sample(store: Store, key: str) -> tuple[int, int]:
    """Shard and row of a key. Raises ``UserError`` where no committed shard holds it."""
    for shard in sorted(store.committed_shards()):
        keys = store.record(shard).keys
        if key in keys:
            return shard, keys.index(key)
    example = store.record(0).keys[:1] if 0 in store.committed_shards() else []
    hint = f"; a key looks like '{example[0]}'" if example else ""
    raise UserError(f"--sample '{key}' is not in {store.shown_url}{hint}")


def read_sample(store: Store, shard: int, row: int) -> dict[str, dict[str, np.ndarray]]:
    """All streams of one sample: stream -> column -> array without a batch axis."""
    where = np.array([shard]), np.array([row])
    return {
        name: {column: batch[0] for column, batch in StreamReader(store, name).read(*where).items()}
        for name in store.manifest.streams
    }


def draw_sample(store: Store, key: str, path: Path) -> None:
    """The decoded latent beside what the store's cut keeps: the crop, or a PCA of the features and
    attention rows of every stored layer."""
    sample = read_sample(store, *find_sample(store, key))
    image = decode_latent(store, sample["latents"]["mean"])
    if "maps" in sample:
        figure = _draw_maps(store, sample["maps"], image)
    else:
        figure, axes = plt.subplots(1, 2, figsize=(6, 3.3))
        _show(axes[0], image, "decoded latent")
        _show(axes[1], sample["image"]["crop"], "crop")
    figure.suptitle(f"{key} (class {int(sample['latents']['label'])})", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_maps(store: Store, maps: dict[str, np.ndarray], image: np.ndarray) -> Figure:
    """One line per query token: where it is, then its attention in every layer, mean of heads."""
    grid, layers = store.manifest.teacher.grid, store.manifest.teacher.layers
    columns = 2 + len(layers)
    figure, axes = plt.subplots(
        len(QUERIES), columns, figsize=(2 * columns, 2.1 * len(QUERIES)), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for line, (down, right) in zip(axes, QUERIES, strict=True):
        row, column = int(down * grid[0]), int(right * grid[1])
        mark = ((column + 0.5) * image.shape[1] / grid[1], (row + 0.5) * image.shape[0] / grid[0])
        _show(line[0], image, "decoded latent, query token")
        line[0].plot(*mark, "r+", markersize=9, markeredgewidth=2)
        for i, layer in enumerate(layers):
            attention = maps["attention"][i, :, row * grid[1] + column].astype(np.float32).mean(0)
            _show(line[2 + i], attention.reshape(grid), f"attention, layer {layer}")
    _show(axes[0, 1], feature_pca(maps["features"], grid), "feature PCA")
    return figure


def _show(axis: Axes, picture: np.ndarray, title: str) -> None:
    axis.imshow(picture)
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def decode_latent(store: Store, mean_Chw: np.ndarray) -> np.ndarray:
    """The posterior's mean through the store's autoencoder: uint8 (R, R, 3)."""
    vae = Autoencoder(store.manifest.autoencoder.name)
    mean = torch.from_numpy(mean_Chw).float().unsqueeze(0)
    latents = (mean - vae.shift_factor) * vae.scaling_factor
    image: np.ndarray = vae.decode(latents)[0].permute(1, 2, 0).numpy()
    return image


def feature_pca(features_ND: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The first three principal components of one image's tokens as RGB, (rows, columns, 3)."""
    features = features_ND.astype(np.float32)
    features = features - features.mean(0)
    _, _, axes = np.linalg.svd(features, full_matrices=False)
    parts = features @ axes[:3].T
    low, high = parts.min(0), parts.max(0)
    scaled: np.ndarray = (parts - low) / np.maximum(high - low, 1e-9)
    return scaled.reshape(*grid, -1)
