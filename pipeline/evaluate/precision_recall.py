"""Precision and recall by nearest neighbours, in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.cli.progress import progress_bar

BLOCK = 4096
"""Rows and columns of a block of distances: 64 MB in float32."""
SPARE = 8
"""Neighbours that are measured exactly beside those that are wanted."""
PAIRS = 2048
"""Pairs of points that are measured at once: 64 MB of differences at width 2048."""


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

    Matrix products in float32 give bounds of all distances; those that the bounds do not decide are
    computed in float64, so that the result is that of float64.
    """
    for points in (samples_ND, reference_MD):
        if len(points) <= k:
            raise ValueError(f"{len(points)} points have no {k}-th neighbour")
    centre = torch.from_numpy(_centre(reference_MD)).to(device)
    samples, reference = _Points(samples_ND, centre), _Points(reference_MD, centre)
    n, m = samples.blocks, reference.blocks
    total = len(n) * (len(n) + 1) // 2 + len(m) * (len(m) + 1) // 2 + len(n) * len(m)
    with progress_bar(total=total, unit="block", desc="neighbours") as bar:
        radii_N = _radii(samples, k, bar)
        radii_M = _radii(reference, k, bar)
        within_reference = torch.zeros(len(samples_ND), dtype=torch.bool, device=device)
        within_samples = torch.zeros(len(reference_MD), dtype=torch.bool, device=device)
        for rows in n:
            left = samples.block(rows)
            for columns in m:
                low = _lower_bounds(left, reference.block(columns))
                _mark(within_reference, low, samples, rows, reference, columns, radii_M)
                _mark(within_samples, low.T, reference, columns, samples, rows, radii_N)
                bar.update()
    return float(within_reference.double().mean()), float(within_samples.double().mean())


class _Points:
    """A set of points, which may be a memory map, about a centre."""

    def __init__(self, points: np.ndarray, centre: Tensor) -> None:
        self._points, self._centre = points, centre
        self.blocks = [
            slice(start, min(start + BLOCK, len(points))) for start in range(0, len(points), BLOCK)
        ]
        # of numbers that are about as long as they are here, and never shorter
        self.squares = torch.cat([self.exact(rows).square().sum(1) for rows in self.blocks])

    def __len__(self) -> int:
        return len(self._points)

    def exact(self, rows: slice | np.ndarray) -> Tensor:
        """(n, D) float64."""
        block = torch.from_numpy(np.array(self._points[rows]))
        return block.to(self._centre.device, torch.float64) - self._centre

    def block(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(n, D) in the dtype of products, and the squares of their lengths."""
        return self.exact(rows).to(_dtype()), self.squares[rows].to(_dtype())


def _dtype() -> torch.dtype:
    """float32, whose products take half of the time of float64 on CPUs and less on most GPUs,
    unless they are rounded to TF32 or bfloat16."""
    precise = torch.get_float32_matmul_precision() == "highest"
    return torch.float32 if precise else torch.float64


def _share(width: int) -> float:
    """Error of a squared distance by ``_lower_bounds``, as a share of the sum of the squared
    lengths: that of a sum of ``width`` products in the dtype, however it is ordered, of their
    rounded factors and of the other operations."""
    return (width + 16) * torch.finfo(_dtype()).eps


def _lower_bounds(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """Numbers (A, B) that are at most the squared distances, by one matrix product; the squared
    distances are at most 2 ``_share`` of the sum of the squared lengths larger."""
    (left_AD, left_A), (right_BD, right_B) = left, right
    keep = 1 - _share(left_AD.shape[1])
    lengths = keep * (left_A[:, None] + right_B)
    return torch.addmm(lengths, left_AD, right_BD.T, alpha=-2)


def _distances(one: _Points, rows: Tensor, other: _Points, columns: Tensor) -> Tensor:
    """Squared distances (n,) of pairs, float64; exactly 0 between copies of a point."""
    found = [
        (one.exact(a.cpu().numpy()) - other.exact(b.cpu().numpy())).square().sum(1)
        for a, b in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True)
    ]
    return torch.cat(found) if found else one.squares[:0]


def _radii(points: _Points, k: int, bar: tqdm[Any]) -> Tensor:
    """(N,): squared distance of each point to its k-th neighbour, not counting the point itself."""
    device, count = points.squares.device, min(k + 1 + SPARE, len(points))
    bounds = torch.full((len(points), count), torch.inf, dtype=_dtype(), device=device)
    numbers = torch.zeros(len(points), count, dtype=torch.int64, device=device)

    def merge(rows: slice, columns: slice, low: Tensor) -> None:
        found, place = low.topk(min(count, low.shape[1]), 1, largest=False)
        candidates = torch.cat([bounds[rows], found], 1)
        of = torch.cat([numbers[rows], place + columns.start], 1)
        bounds[rows], place = candidates.topk(count, 1, largest=False)
        numbers[rows] = of.gather(1, place)

    for number, rows in enumerate(points.blocks):
        left = points.block(rows)
        for columns in points.blocks[number:]:  # distances are symmetric
            low = _lower_bounds(left, points.block(columns))
            merge(rows, columns, low)
            if columns != rows:
                merge(columns, rows, low.T)
            bar.update()

    all_rows = torch.arange(len(points), device=device).repeat_interleave(count)
    exact = _distances(points, all_rows, points, numbers.flatten()).view(-1, count)
    radii = exact.topk(k + 1, 1, largest=False).values[:, k]
    if count < len(points):  # every other point is at least as far as the last bound
        for row in (bounds[:, -1].double() < radii).nonzero().flatten().tolist():
            radii[row] = _exact_radius(points, row, k)
    return radii


def _exact_radius(points: _Points, row: int, k: int) -> Tensor:
    point = points.exact(slice(row, row + 1))
    squares = [(points.exact(rows) - point).square().sum(1) for rows in points.blocks]
    return torch.cat(squares).topk(k + 1, largest=False).values[k]


def _mark(
    within: Tensor,
    low: Tensor,
    one: _Points,
    rows: slice,
    other: _Points,
    columns: slice,
    radii: Tensor,
) -> None:
    """Set ``within`` of those of ``rows`` that lie within the radius of one of ``columns``. Pairs
    that the bounds do not decide are measured, unless another pair decides."""
    limits = radii[columns]
    share = _share(other.exact(slice(0, 1)).shape[1])
    slack = 2 * share * (one.squares[rows].max() + other.squares[columns])
    # rounded down, so that no bound above the radius passes
    certain = (limits - slack - limits.abs() * torch.finfo(low.dtype).eps).to(low.dtype)
    inside = within[rows] | (low <= certain).any(1)
    possible = low <= (limits * (1 + torch.finfo(low.dtype).eps)).to(low.dtype)
    left = (possible.any(1) & ~inside).nonzero().flatten()
    pair_rows, pair_columns = possible[left].nonzero(as_tuple=True)
    pair_rows = left[pair_rows]
    squares = _distances(one, pair_rows + rows.start, other, pair_columns + columns.start)
    inside[pair_rows[squares <= limits[pair_columns]]] = True
    within[rows] = inside


def _centre(points: np.ndarray) -> np.ndarray:
    """Mean of the first points; subtracting it avoids rounding errors of points far from zero."""
    centre: np.ndarray = np.asarray(points[:BLOCK], np.float64).mean(0)
    return centre
