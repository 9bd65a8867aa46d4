"""Precision and recall by nearest neighbours, in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.cli.progress import progress_bar

BLOCK_ROWS, BLOCK_COLUMNS = 2048, 8192
"""Size of a block of distances: 128 MB in float64."""
MAX_ROUNDING = 1e-12
"""Squared distances below this share of the squared lengths are rounding errors of 0."""


def precision_recall(
    samples_ND: np.ndarray,
    reference_MD: np.ndarray,
    k: int = 3,
    *,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991).

    Each point has a ball that reaches to its ``k``-th neighbour in its own set. Precision is the
    share of samples within the ball of a reference point, recall the share of reference points
    within the ball of a sample. Arrays may be memory maps, because they are read in blocks. Raises
    ``ValueError`` where a set has at most ``k`` points.
    """
    for points in (samples_ND, reference_MD):
        if len(points) <= k:
            raise ValueError(f"{len(points)} points have no {k}-th neighbour")
    centre = torch.from_numpy(_centre(reference_MD)).to(device)
    blocks = -(-len(samples_ND) // BLOCK_ROWS) * 2 + -(-len(reference_MD) // BLOCK_ROWS)
    with progress_bar(total=blocks, unit="block", desc="neighbours") as bar:
        radii_N = _radii(samples_ND, k, centre, bar)
        radii_M = _radii(reference_MD, k, centre, bar)
        within_reference = 0
        within_samples = torch.zeros(len(reference_MD), dtype=torch.bool, device=device)
        for rows in _blocks(len(samples_ND), BLOCK_ROWS):
            inside = torch.zeros(rows.stop - rows.start, dtype=torch.bool, device=device)
            left = _points(samples_ND, rows, centre)
            for columns in _blocks(len(reference_MD), BLOCK_COLUMNS):
                squares = _squares(left, _points(reference_MD, columns, centre))
                inside |= (squares <= radii_M[columns]).any(1)
                within_samples[columns] |= (squares <= radii_N[rows, None]).any(0)
            within_reference += int(inside.sum())
            bar.update()
    return within_reference / len(samples_ND), int(within_samples.sum()) / len(reference_MD)


def _radii(points: np.ndarray, k: int, centre: Tensor, bar: tqdm[Any]) -> Tensor:
    """(N,): squared distance of each point to its k-th neighbour, not counting the point itself."""
    radii = torch.empty(len(points), dtype=torch.float64, device=centre.device)
    for rows in _blocks(len(points), BLOCK_ROWS):
        left = _points(points, rows, centre)
        nearest = left.new_full((len(left), k + 1), torch.inf)
        for columns in _blocks(len(points), BLOCK_COLUMNS):
            squares = _squares(left, _points(points, columns, centre))
            candidates = torch.cat([nearest, squares], 1)
            nearest = candidates.topk(k + 1, 1, largest=False).values
        radii[rows] = nearest[:, k]
        bar.update()
    return radii


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _points(points: np.ndarray, rows: slice, centre: Tensor) -> Tensor:
    block = torch.from_numpy(np.array(points[rows])).to(centre.device, torch.float64)
    return block - centre


def _centre(points: np.ndarray) -> np.ndarray:
    """Mean of the first points; subtracting it avoids rounding errors of points far from zero."""
    centre: np.ndarray = np.asarray(points[:BLOCK_COLUMNS], np.float64).mean(0)
    return centre


def _squares(left_AD: Tensor, right_BD: Tensor) -> Tensor:
    """Squared distances (A, B) by one matrix product; exactly 0 between copies of a point."""
    lengths = left_AD.square().sum(1)[:, None] + right_BD.square().sum(1)
    squares = lengths - 2 * left_AD @ right_BD.T
    return torch.where(squares < MAX_ROUNDING * lengths, 0.0, squares)
