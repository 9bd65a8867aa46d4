"""Precision and recall by nearest neighbours, in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

ROWS, COLUMNS = 2048, 8192
"""Of a block of distances: 128 MB in float64."""
SAME = 1e-12
"""Squared distances below this share of the squared lengths are rounding: of one point."""


def precision_recall(
    samples_ND: np.ndarray,
    reference_MD: np.ndarray,
    k: int = 3,
    *,
    device: torch.device | str = "cpu",
    quiet: bool = True,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991): the shares of samples
    within the balls around reference points that reach to their ``k``-th neighbour, and of
    reference points within those around samples.

    Arrays may be memory maps: blocks of them are read. Raises ``ValueError`` where a set has not
    ``k`` neighbours.
    """
    for points in (samples_ND, reference_MD):
        if len(points) <= k:
            raise ValueError(f"{len(points)} points have no {k}-th neighbour")
    centre = torch.from_numpy(_centre(reference_MD)).to(device)
    blocks = -(-len(samples_ND) // ROWS) * 2 + -(-len(reference_MD) // ROWS)
    with tqdm(total=blocks, unit="block", desc="neighbours", disable=quiet) as bar:
        radii_N = _radii(samples_ND, k, centre, bar)
        radii_M = _radii(reference_MD, k, centre, bar)
        within_reference = 0
        within_samples = torch.zeros(len(reference_MD), dtype=torch.bool, device=device)
        for rows in _blocks(len(samples_ND), ROWS):
            inside = torch.zeros(rows.stop - rows.start, dtype=torch.bool, device=device)
            left = _points(samples_ND, rows, centre)
            for columns in _blocks(len(reference_MD), COLUMNS):
                squares = _squares(left, _points(reference_MD, columns, centre))
                inside |= (squares <= radii_M[columns]).any(1)
                within_samples[columns] |= (squares <= radii_N[rows, None]).any(0)
            within_reference += int(inside.sum())
            bar.update()
    return within_reference / len(samples_ND), int(within_samples.sum()) / len(reference_MD)


def _radii(points: np.ndarray, k: int, centre: Tensor, bar: tqdm[Any]) -> Tensor:
    """Squared distance of every point to its k-th neighbour, (N,). A point is its own first."""
    radii = torch.empty(len(points), dtype=torch.float64, device=centre.device)
    for rows in _blocks(len(points), ROWS):
        left = _points(points, rows, centre)
        nearest = left.new_full((len(left), k + 1), torch.inf)
        for columns in _blocks(len(points), COLUMNS):
            squares = _squares(left, _points(points, columns, centre))
            both = torch.cat([nearest, squares], 1)
            nearest = both.topk(k + 1, 1, largest=False).values
        radii[rows] = nearest[:, k]
        bar.update()
    return radii


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _points(points: np.ndarray, rows: slice, centre: Tensor) -> Tensor:
    block = torch.from_numpy(np.array(points[rows])).to(centre.device, torch.float64)
    return block - centre


def _centre(points: np.ndarray) -> np.ndarray:
    """A point amid them: distances of what lies far from zero would lose digits."""
    centre: np.ndarray = np.asarray(points[:COLUMNS], np.float64).mean(0)
    return centre


def _squares(left_AD: Tensor, right_BD: Tensor) -> Tensor:
    """Squared distances (A, B) by one product; copies of a point are at 0 exactly."""
    lengths = left_AD.square().sum(1)[:, None] + right_BD.square().sum(1)
    squares = lengths - 2 * left_AD @ right_BD.T
    return torch.where(squares < SAME * lengths, 0.0, squares)
