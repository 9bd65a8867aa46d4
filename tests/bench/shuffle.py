"""Entropy of a batch's labels by shuffle window, against that of a full shuffle."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.store import SampleOrder
from tests.bench.options import ShuffleOptions as Options
from tests.bench.report import Heading, Report, Row, Table

HEADINGS = (
    Heading("window", "window"),
    Heading("spread", "spread as by extraction", ".3f"),
    Heading("spread_of_full", "of a full shuffle", ".1%"),
    Heading("sorted", "sorted by class", ".3f"),
    Heading("sorted_of_full", "of a full shuffle", ".1%"),
)


def run(options: Options) -> Report:
    in_order = np.arange(options.samples) * options.classes // options.samples
    layouts = {
        "spread": np.random.default_rng(0).permutation(in_order),
        "sorted": in_order,
    }
    rng, batch = np.random.default_rng(1), min(options.batch, options.samples)
    full = float(
        np.mean(
            [
                entropy(in_order[rng.choice(options.samples, batch, replace=False)])
                for _ in range(options.batches)
            ]
        )
    )
    rows: list[Row] = []
    for window in options.windows:
        row: dict[str, Any] = {"window": str(window)}
        for name, labels in layouts.items():
            row[name] = mean_entropy(labels, window, options)
            row[f"{name}_of_full"] = row[name] / full if full else 1.0
        rows.append(row)
    about = {
        "samples": options.samples,
        "classes": options.classes,
        "samples per shard": options.shard_size,
        "batch": options.batch,
        "nats of a full shuffle": round(full, 4),
    }
    return Report(about, [Table("Mean entropy of a batch's labels, in nats", HEADINGS, rows)])


def mean_entropy(labels: np.ndarray, window: int, options: Options) -> float:
    """Mean label entropy in nats of batches of the first epoch. ``labels`` (samples,) is in the
    order of the shards."""
    size = options.shard_size
    shards = -(-options.samples // size)
    sizes = np.full(shards, size)
    sizes[-1] = options.samples - (shards - 1) * size
    order = SampleOrder(0, sizes, window)
    steps = max(1, options.samples // options.batch)
    found = []
    for step in np.unique(np.linspace(0, steps - 1, options.batches, dtype=np.int64)).tolist():
        shard, row = order.locate(np.arange(step * options.batch, (step + 1) * options.batch))
        found.append(entropy(labels[shard * size + row]))
    return float(np.mean(found))


def entropy(labels: np.ndarray) -> float:
    """Entropy of the distribution of labels, in nats."""
    _, counts = np.unique(labels, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
