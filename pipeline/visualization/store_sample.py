"""One sample of a store as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch

from pipeline.alignment.losses import Targets
from pipeline.autoencoders import decode_means, open_decoder
from pipeline.datasets.class_names import row_name
from pipeline.store import Store, StreamReader
from pipeline.store.captions import unpack_texts
from pipeline.targets.sources import Wanted, read_targets
from pipeline.text import shortened
from schemas.errors import UserError, plain_text
from schemas.fields import TEXT
from schemas.networks import TeacherInfo

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MAX_CAPTION = 120  # characters in the title
QUERIES = ((0.5, 0.5), (0.25, 0.25), (0.75, 0.75))  # (row, column) as fractions of the grid


def find_sample(store: Store, key: str) -> tuple[int, int]:
    """Shard and row of a key. Raises ``UserError`` if no committed shard has it."""
    for shard in sorted(store.committed_shards()):
        keys = store.record(shard).keys
        if key in keys:
            return shard, keys.index(key)
    example = store.record(0).keys[:1] if 0 in store.committed_shards() else []
    hint = f"; a key looks like '{example[0]}'" if example else ""
    raise UserError(f"--sample '{key}' is not in {store.shown_url}{hint}")


def read_latents(store: Store, shard: int, row: int) -> dict[str, np.ndarray]:
    """Mean, std and label of one sample, without a batch axis."""
    batch = StreamReader(store, "latents").read(np.array([shard]), np.array([row]))
    return {column: values[0] for column, values in batch.items()}


def read_captions(store: Store, shard: int, row: int) -> list[str]:
    """The captions of a sample; empty where the store has none, or only their embeddings."""
    streams = store.manifest.text_streams.items()
    name = next((name for name, stream in streams if TEXT in stream.columns), None)
    if name is None:
        return []
    reader = StreamReader(store, name, columns=[TEXT])
    return unpack_texts(reader.read(np.array([shard]), np.array([row]))[TEXT][0])


def first_of_each_class(store: Store, count: int) -> list[int]:
    """Rows of shard 0 with the first sample of each of its first ``count`` classes."""
    rows = np.arange(store.record(0).samples)
    labels = StreamReader(store, "latents").read(np.zeros_like(rows), rows)["label"]
    return sorted(np.unique(labels, return_index=True)[1].tolist())[:count]


def draw_sample(store: Store, key: str, path: Path, stream: str | None = None) -> None:
    """Draw the decoded latent, a PCA of the teacher's features and the attention of a few query
    tokens in every layer: the targets that training computes from the store's cut. Raises
    ``UserError`` if ``path`` cannot be written."""
    shard, row = find_sample(store, key)
    sample = read_latents(store, shard, row)
    image = decode_latent(store, sample["mean"])
    teacher = store.manifest.teacher_stream(stream)[1].teacher
    request = Wanted(features=True, layers=teacher.layers, heads=teacher.heads)
    targets = read_targets(store, np.array([shard]), np.array([row]), request, stream)
    figure = _draw_targets(teacher, targets, image)
    dataset = store.manifest.dataset
    name = (
        "" if dataset.dummy_class else f" (class {row_name(int(sample['label']), dataset.classes)})"
    )
    captions = [shortened(plain_text(c), MAX_CAPTION) for c in read_captions(store, shard, row)]
    title = "\n".join([f"{key}{name}", *captions]).replace("$", r"\$")  # not mathematics
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for an unknown suffix
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--png '{path}' cannot be written: {reason}") from None
    finally:
        plt.close(figure)


def _draw_targets(teacher: TeacherInfo, targets: Targets, image: np.ndarray) -> Figure:
    """One line per query token: its position, then its attention in every layer, mean of heads."""
    assert targets.features is not None
    grid, layers = teacher.grid, teacher.layers
    columns = 2 + len(layers)
    figure, axes = plt.subplots(
        len(QUERIES), columns, figsize=(2 * columns, 2.1 * len(QUERIES)), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for line, (y, x) in zip(axes, QUERIES, strict=True):
        row, column = int(y * grid[0]), int(x * grid[1])
        mark = ((column + 0.5) * image.shape[1] / grid[1], (row + 0.5) * image.shape[0] / grid[0])
        _show(line[0], image, "decoded latent, query token")
        line[0].plot(*mark, "r+", markersize=9, markeredgewidth=2)
        for i, layer in enumerate(layers):
            assert targets.attention is not None
            attention = targets.attention[0, i, :, row * grid[1] + column].mean(0).numpy()
            _show(line[2 + i], attention.reshape(grid), f"attention, layer {layer}")
    _show(axes[0, 1], feature_pca(targets.features[0].numpy(), grid), "feature PCA")
    return figure


def _show(axis: Axes, picture: np.ndarray, title: str) -> None:
    axis.imshow(picture)
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def decode_latent(store: Store, mean_Chw: np.ndarray) -> np.ndarray:
    """The posterior mean (C, h, w) decoded by the store's autoencoder: uint8 (R, R, 3). Raises
    ``UserError`` if the autoencoder is not available or does not fit the latents."""
    encoder = store.manifest.autoencoder
    mean = torch.from_numpy(mean_Chw).unsqueeze(0)
    try:
        image = decode_means(open_decoder(None, encoder, option=None), encoder, mean)[0]
    except UserError as error:
        raise UserError(f"{store.shown_url}: {error}") from None
    pixels: np.ndarray = image.permute(1, 2, 0).numpy()
    return pixels


def feature_pca(features_ND: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The first three principal components of one image's tokens as RGB: (rows, columns, 3)."""
    features = features_ND.astype(np.float32)
    features = features - features.mean(0)
    _, _, axes = np.linalg.svd(features, full_matrices=False)
    parts = features @ axes[:3].T
    low, high = parts.min(0), parts.max(0)
    scaled: np.ndarray = (parts - low) / np.maximum(high - low, 1e-9)
    return scaled.reshape(*grid, -1)
