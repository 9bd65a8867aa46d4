"""Contact sheet of a store: decoded latents, one row for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.autoencoders import decode_means, open_decoder
from pipeline.cli.progress import progress_bar
from pipeline.datasets.class_names import row_name
from pipeline.store import Store, StreamReader
from pipeline.visualization.image_grid import save_grid
from schemas.errors import UserError

ROWS, COLUMNS = 10, 8
BATCH = 8
"""Images that are decoded at a time."""
MAX_SHARDS = 64
"""Shards whose labels are read to find images of each class."""


def draw_contact_sheet(store: Store, path: Path) -> int:
    """Draw the first ``COLUMNS`` images of each of the first ``ROWS`` classes with images, or where
    there is one class only as many of that. Returns the number of images. Raises ``UserError``
    where the file cannot be written or the autoencoder is not available."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--png '{path}': '{path.suffix}' is not an image format; use .png")
    table = store.manifest.dataset.classes
    classes = list(table.trained[:ROWS])
    one = len(classes) == 1
    places = find_images(store, classes, COLUMNS * ROWS if one else COLUMNS)
    shown = [label for label in classes if places[label]]
    if not shown:
        raise UserError(f"{store.shown_url} has no images yet: run its extraction again")
    found = [place for label in shown for place in places[label]]
    shards, rows = np.array(found, np.int64).T
    means = StreamReader(store, "latents", columns=["mean"]).read(shards, rows)["mean"]
    encoder = store.manifest.autoencoder
    try:
        decoder = open_decoder(None, encoder, option=None)
        parts = torch.from_numpy(means).split(BATCH)
        with progress_bar(total=len(means), unit="image", desc="decode") as bar:
            decoded = []
            for part in parts:
                decoded.append(decode_means(decoder, encoder, part).cpu())
                bar.update(len(part))
        images = torch.cat(decoded)
    except UserError as error:
        raise UserError(f"{store.shown_url}: {error}") from None
    names = [] if one else [row_name(label, table) for label in shown]
    sheet = images
    if not one:  # rows with fewer images end in white ones
        sheet = images.new_full((len(shown) * COLUMNS, *images.shape[1:]), 255)
        starts = np.cumsum([0, *(len(places[label]) for label in shown)])
        for row, label in enumerate(shown):
            count = len(places[label])
            sheet[row * COLUMNS : row * COLUMNS + count] = images[starts[row] :][:count]
    try:
        save_grid(sheet, path, COLUMNS, row_names=names)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"--png '{path}' cannot be written: {reason}") from None
    return len(images)


def find_images(store: Store, classes: list[int], count: int) -> dict[int, list[tuple[int, int]]]:
    """Shard and row of the first ``count`` images of each class, among the first ``MAX_SHARDS``
    committed shards."""
    found: dict[int, list[tuple[int, int]]] = {label: [] for label in classes}
    reader = StreamReader(store, "latents", columns=["label"])
    for shard in sorted(store.committed_shards())[:MAX_SHARDS]:
        rows = np.arange(store.record(shard).samples)
        labels = reader.read(np.full_like(rows, shard), rows)["label"]
        for row, label in enumerate(labels.tolist()):
            if label in found and len(found[label]) < count:
                found[label].append((shard, row))
        if all(len(places) == count for places in found.values()):
            break
    return found
