"""FID and precision/recall from features, against torch-fidelity on the same features."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import numpy as np
import torch

from tests.bench.checkouts import peak_megabytes
from tests.bench.options import EvaluationOptions as Options
from tests.bench.report import Heading, Report, Table

HEADINGS = (
    Heading("metric", "metric"),
    Heading("ours", "ours s", ".1f"),
    Heading("theirs", "torch-fidelity s", ".1f"),
    Heading("ratio", "times as fast", ".2f"),
    Heading("difference", "difference", ".0e"),
    Heading("ours_mb", "ours, MB more", ".0f"),
    Heading("theirs_mb", "torch-fidelity, MB more", ".0f"),
)
BATCH = 64
"""Features added at a time, as an evaluation does."""


def run(options: Options) -> Report:
    """Each measurement has a process of its own, for its memory."""
    rows = []
    for metric, count in (("fid", options.count), ("precision and recall", options.manifold)):
        (ours, theirs) = (_measured(way, metric, count, options) for way in (_ours, _theirs))
        scale = max(1.0, float(np.abs(theirs["value"]).max()))
        difference = float(np.abs(np.subtract(ours["value"], theirs["value"])).max()) / scale
        rows.append(
            {
                "metric": f"{metric}, {count} x {options.width}",
                "ours": ours["seconds"],
                "theirs": theirs["seconds"],
                "ratio": theirs["seconds"] / ours["seconds"],
                "difference": difference,
                "ours_mb": ours["mb"],
                "theirs_mb": theirs["mb"],
            }
        )
    return Report(
        {"clock": "CPU seconds", "threads": options.threads},
        [Table("evaluation", HEADINGS, rows)],
        {"fid_times_as_fast": rows[0]["ratio"], "prc_times_as_fast": rows[1]["ratio"]},
    )


def _measured(way: Any, metric: str, count: int, options: Options) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result: dict[str, Any] = pool.apply(_run, (way, metric, count, options))
        return result


def _run(way: Any, metric: str, count: int, options: Options) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    samples, reference = (_features(seed, count, options.width) for seed in (1, 2))
    way(metric, samples[:BATCH], reference[:BATCH])  # imports
    before, start = peak_megabytes(), time.process_time()
    value = way(metric, samples, reference)
    seconds = time.process_time() - start
    return {"value": value, "seconds": seconds, "mb": peak_megabytes() - before}


def _features(seed: int, count: int, width: int) -> np.ndarray:
    """Non-negative and correlated, as those of the Inception network; the two sets differ."""
    mix = np.random.default_rng(0).standard_normal((width, width), dtype=np.float32)
    rng, parts = np.random.default_rng(seed), []
    for begin in range(0, count, 1000):
        x = rng.standard_normal((min(1000, count - begin), width), dtype=np.float32)
        parts.append(np.abs(x @ mix / np.float32(width**0.5) + np.float32(0.02 * seed)))
    return np.concatenate(parts)


def _ours(metric: str, samples: np.ndarray, reference: np.ndarray) -> list[float]:
    from pipeline.evaluate.frechet import FeatureStatistics, frechet_distance
    from pipeline.evaluate.precision_recall import precision_recall

    if metric != "fid":
        return list(precision_recall(samples, reference))
    moments = []
    for features in (samples, reference):
        statistics = FeatureStatistics(features.shape[1])
        for batch in torch.from_numpy(features).split(BATCH):
            statistics.add(batch)
        moments.append(statistics.moments())
    return [frechet_distance(*moments)]


def _theirs(metric: str, samples: np.ndarray, reference: np.ndarray) -> list[float]:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    a, b = torch.from_numpy(samples), torch.from_numpy(reference)
    if metric != "fid":
        found = calculate_precision_recall_part(a, b)
        return [float(value) for value in found[:2]]
    both = [fid_features_to_statistics(features) for features in (a, b)]
    return [float(next(iter(fid_statistics_to_metric(*both, False).values())))]
