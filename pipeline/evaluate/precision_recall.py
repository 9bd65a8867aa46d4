"""Precision and recall by nearest neighbours, in blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.cli.progress import progress_bar
from pipeline.precision import arithmetic

BLOCK_ROWS, BLOCK_COLUMNS = 2048, 4096
"""Size of a block of distances: 32 MB in float32."""
MAX_ERROR = 1e-5
"""Error of a squared distance in float32, as a share of the squared lengths of both points: that of
170 roundings in one direction, while products of thousands of numbers have that of ten."""
ROUNDING = 1e-12
"""Share up to which numbers in float64 differ that are equal."""
SPARE = 4
"""Candidates for the nearest neighbours in float32, beyond those that are searched."""
PAIRS = 4096
"""Pairs of points that are compared one by one at a time."""
MAX_PAIRS = 1 / 256
"""Share of the pairs of a block up to which they are compared one by one."""


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
    within the ball of a sample. Distances are computed in float32, and in float64 where its errors
    might decide, so that the numbers are those of float64. Arrays may be memory maps, because they
    are read in blocks. Raises ``ValueError`` where a set has at most ``k`` points.
    """
    for points in (samples_ND, reference_MD):
        if len(points) <= k:
            raise ValueError(f"{len(points)} points have no {k}-th neighbour")
    centre = torch.from_numpy(_centre(reference_MD)).to(device)
    blocks = -(-len(samples_ND) // BLOCK_ROWS) * 2 + -(-len(reference_MD) // BLOCK_ROWS)
    with progress_bar(total=blocks, unit="block", desc="neighbours") as bar, arithmetic("float32"):
        radii_N = _radii(samples_ND, k, centre, bar)
        radii_M = _radii(reference_MD, k, centre, bar)
        in_reference = torch.zeros(len(samples_ND), dtype=torch.bool, device=device)
        in_samples = torch.zeros(len(reference_MD), dtype=torch.bool, device=device)
        for rows in _blocks(len(samples_ND), BLOCK_ROWS):
            left = _read(samples_ND, rows, centre)
            for columns in _blocks(len(reference_MD), BLOCK_COLUMNS):
                right = _read(reference_MD, columns, centre)
                squares = _squares(left, right)
                in_reference[rows] |= _inside(squares, left, right, radii_M[columns])
                in_samples[columns] |= _inside(squares.T, right, left, radii_N[rows])
            bar.update()
    return float(in_reference.double().mean()), float(in_samples.double().mean())


class _Block(NamedTuple):
    """Some points, less the centre."""

    points: Tensor
    """(A, D) float32."""
    lengths: Tensor
    """(A,) squared, float32."""
    exact: Tensor
    """(A, D) float64."""


def _read(points: np.ndarray, rows: slice | np.ndarray, centre: Tensor) -> _Block:
    exact = torch.from_numpy(np.array(points[rows])).to(centre) - centre
    rounded = exact.float()
    return _Block(rounded, rounded.square().sum(1), exact)


def _inside(squares_AB: Tensor, left: _Block, right: _Block, radii_B: Tensor) -> Tensor:
    """(A,): if a point of ``left`` is in one of the balls of ``right``, of squared ``radii_B``."""
    beyond = squares_AB - radii_B.float()
    # a point of a ball has at most twice the squared length of another, and twice their distance
    error_A = 3 * MAX_ERROR * (left.lengths + radii_B.max().float())
    least = beyond.amin(1)
    inside = least <= -error_A
    open_ = (~inside & (least <= error_A)).nonzero()[:, 0]
    if not len(open_):
        return inside
    i, j = (beyond[open_].abs_() <= error_A[open_, None]).nonzero(as_tuple=True)
    if len(i) > MAX_PAIRS * squares_AB.numel():
        limits = radii_B * (1 + ROUNDING)
        inside[open_] = (_exact_squares(left.exact[open_], right.exact) <= limits).any(1)
        return inside
    for some in torch.arange(len(i)).split(PAIRS):
        rows = open_[i[some]]
        squares = (left.exact[rows] - right.exact[j[some]]).square().sum(1)
        inside[rows[squares <= radii_B[j[some]] * (1 + ROUNDING)]] = True
    return inside


def _radii(points: np.ndarray, k: int, centre: Tensor, bar: tqdm[Any]) -> Tensor:
    """(N,): squared distance of each point to its k-th neighbour, not counting the point itself."""
    count = len(points)
    wanted = min(k + 1 + SPARE, count)
    nearest = torch.full((count, wanted), torch.inf, device=centre.device)
    numbers = torch.zeros(count, wanted, dtype=torch.int64, device=centre.device)

    def merge(rows: slice, squares_AB: Tensor, first: int) -> None:
        found, places = squares_AB.topk(min(wanted, squares_AB.shape[1]), 1, largest=False)
        nearest[rows], order = torch.cat([nearest[rows], found], 1).topk(wanted, 1, largest=False)
        numbers[rows] = torch.cat([numbers[rows], places + first], 1).gather(1, order)

    for rows in _blocks(count, BLOCK_ROWS):
        left = _read(points, rows, centre)
        for columns in _blocks(count, BLOCK_ROWS):
            if columns.start < rows.start:
                continue
            squares = _squares(left, _read(points, columns, centre) if columns != rows else left)
            merge(rows, squares, columns.start)
            if columns != rows:
                merge(columns, squares.T, rows.start)
        bar.update()
    radii = torch.empty(count, dtype=torch.float64, device=centre.device)
    for rows in _blocks(count, max(1, PAIRS // wanted)):
        left = _read(points, rows, centre)
        others = _read(points, numbers[rows].flatten().cpu().numpy(), centre).exact
        squares = (left.exact[:, None] - others.view(-1, wanted, others.shape[1])).square().sum(2)
        radii[rows] = squares.topk(k + 1, 1, largest=False).values[:, k]
        # no point beyond the candidates may be nearer
        least = nearest[rows, -1] - 3 * MAX_ERROR * (left.lengths + nearest[rows, -1])
        unsure = (least <= radii[rows]).nonzero()[:, 0]
        if wanted < count and len(unsure):
            radii[rows.start + unsure] = _exact_radii(left.exact[unsure], points, k, centre)
    return radii


def _exact_radii(exact_AD: Tensor, points: np.ndarray, k: int, centre: Tensor) -> Tensor:
    nearest = exact_AD.new_full((len(exact_AD), k + 1), torch.inf)
    for columns in _blocks(len(points), BLOCK_COLUMNS):
        squares = _exact_squares(exact_AD, _read(points, columns, centre).exact)
        nearest = torch.cat([nearest, squares], 1).topk(k + 1, 1, largest=False).values
    return nearest[:, k]


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _centre(points: np.ndarray) -> np.ndarray:
    """Mean of the first points; subtracting it avoids rounding errors of points far from zero."""
    centre: np.ndarray = np.asarray(points[:BLOCK_COLUMNS], np.float64).mean(0)
    return centre


def _squares(left: _Block, right: _Block) -> Tensor:
    """Squared distances (A, B) in float32, by one matrix product."""
    products = torch.addmm(right.lengths, left.points, right.points.T, alpha=-2)
    return products.add_(left.lengths[:, None])


def _exact_squares(left_AD: Tensor, right_BD: Tensor) -> Tensor:
    """Squared distances (A, B) in float64; exactly 0 between copies of a point."""
    lengths = left_AD.square().sum(1)[:, None] + right_BD.square().sum(1)
    squares = lengths - 2 * left_AD @ right_BD.T
    return torch.where(squares < ROUNDING * lengths, 0.0, squares)
