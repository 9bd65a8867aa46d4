"""Precision and recall by nearest neighbours, in blocks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.cli.progress import progress_bar
from pipeline.precision import arithmetic

BLOCK = 1024
"""Points of each set in a block of distances: 4 MB in float32."""
ROWS = 128
"""Points at a time in float64, which stay in a cache."""
GROUPS = 16
"""Groups of a block's points, per neighbour, of which each has a nearest one."""
MAX_CANDIDATES = 100
"""Candidates, per neighbour, up to which they are compared with a point one by one."""
MAX_PAIRS = 1 / 256
"""Share of the pairs of a block up to which they are compared one by one."""
ROUNDING = 1e-12
"""Share up to which numbers in float64 differ that are equal."""
TINY = 1e-30
"""Bound of the errors by products that are too small for float32 (1e-38 each)."""


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
    within the ball of a sample. Products in bfloat16 or float32 bound each distance, and those that
    the bounds leave open are computed in float64, so that the numbers are those of float64. Arrays
    may be memory maps, because they are read in blocks. Raises ``ValueError`` where a set has at
    most ``k`` points, or numbers that are not finite.
    """
    sets = samples_ND, reference_MD
    for points in sets:
        if len(points) <= k:
            raise ValueError(f"{len(points)} points have no {k}-th neighbour")
    # the whole reference in even steps, because its first points may be of one class
    mean = np.asarray(reference_MD[:: -(-len(reference_MD) // BLOCK)], np.float64).mean(0)
    centre = torch.from_numpy(mean.astype(np.result_type(*sets, np.float32))).to(device)
    scale, dtype = _scale(sets, centre), _dtype(centre.device)
    samples, reference = (_Points(points, centre, scale, dtype) for points in sets)
    columns_of = _blocks(len(reference_MD), BLOCK)
    total = 2 * len(_blocks(len(samples_ND), BLOCK)) + len(columns_of)
    with progress_bar(total=total, unit="block", desc="neighbours") as bar, arithmetic("float32"):
        for some in (samples, reference):
            some.find_radii(k, bar)
        for rows in _blocks(len(samples_ND), BLOCK):
            left = samples.rounded(rows)
            for columns in columns_of:
                products = left @ reference.rounded(columns).T
                block = _Block.of(samples, rows, reference, columns, products)
                _find_inside(block)
                _find_inside(block.transposed())
            bar.update()
    return float(samples.inside.double().mean()), float(reference.inside.double().mean())


def _dtype(device: torch.device) -> torch.dtype:
    """Dtype of the products: bfloat16 on CPUs that multiply it twice as fast as float32."""
    fast = device.type == "cpu" and torch.backends.mkldnn.is_available()
    fast = fast and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def _scale(sets: tuple[np.ndarray, ...], centre_D: Tensor) -> float:
    """The power of two that brings all numbers between -1 and 1, so that squares neither overflow
    nor underflow."""
    parts = [(points, rows) for points in sets for rows in _blocks(len(points), ROWS)]
    largest = torch.stack([_read(*part, centre_D).abs_().max() for part in parts]).max()
    if not largest.isfinite():
        raise ValueError("points with numbers that are not finite")
    return 2.0 ** -min(max(math.frexp(largest)[1], -126), 126)


class _Points:
    """A set of points, about a centre near to them: rounding errors are shares of the lengths.

    With x and y for two points, rounded to x + e and y + f, the product of these differs from x y
    by at most |e| |y| + |x| |f| + |e| |f|, and its sum in float32, of D terms in any order, by D
    roundings' share of |x + e| |y + f| (Higham, Accuracy and Stability, section 3.1).
    """

    def __init__(
        self, array_ND: np.ndarray, centre_D: Tensor, scale: float, dtype: torch.dtype
    ) -> None:
        self.array, self.centre, self.scale, self.dtype = array_ND, centre_D, scale, dtype
        parts = []
        for rows in _blocks(len(array_ND), ROWS):
            exact = self.exact(rows)
            error = exact - self.rounded(rows)
            parts.append(torch.stack([exact.square().sum(1), error.square().sum(1)]))
        self.squares, errors = torch.cat(parts, 1)
        """(N,) float64: squared lengths."""
        self.lengths, self.errors = self.squares.sqrt(), errors.sqrt()
        single = torch.finfo(torch.float32).eps
        # twice the bound by D roundings; a result is rounded once more to the dtype
        self.sum_error = array_ND.shape[1] * single
        self.product_error = 0.51 * torch.finfo(dtype).eps
        ratio = float((self.errors / self.lengths.clamp(min=TINY)).max())
        self.share = ratio * (2 + ratio) + 16 * single
        self.share += (1 + ratio) ** 2 * (self.sum_error + self.product_error)
        """Bound of the error of a squared distance, as a share of both points' squared lengths."""
        self.radii = torch.empty(0)
        """(N,) float64, squared: the balls."""
        self.inside = torch.zeros(len(array_ND), dtype=torch.bool, device=centre_D.device)
        """(N,): the points that are known to be in a ball of the other set."""

    def rounded(self, rows: slice) -> Tensor:
        """(A, D) in ``dtype``."""
        return _read(self.array, rows, self.centre).mul_(self.scale).to(self.dtype)

    def exact(self, rows: slice | Tensor) -> Tensor:
        """(A, D) float64."""
        return _read(self.array, rows, self.centre.double()).mul_(self.scale)

    def find_radii(self, k: int, bar: tqdm[Any]) -> None:
        """Find the squared distance of each point to its k-th neighbour, which is not itself."""
        count, device = len(self.array), self.centre.device
        nearest = torch.full((count, k), torch.inf, dtype=self.squares.dtype, device=device)
        counts = torch.zeros(count, dtype=torch.int64, device=device)
        found = []
        for rows in _blocks(count, BLOCK):
            left = self.rounded(rows)
            for columns in _blocks(count, BLOCK)[rows.start // BLOCK :]:
                right = left if columns == rows else self.rounded(columns)
                block = _Block.of(self, rows, self, columns, left @ right.T)
                if columns == rows:
                    block.least.fill_diagonal_(torch.inf)
                found.append(block.candidates(nearest, counts))
                if columns != rows:
                    found.append(block.transposed().candidates(nearest, counts))
            bar.update()
        i, j, products = (torch.cat(parts) for parts in zip(*found, strict=True))
        crowded = counts > MAX_CANDIDATES * k
        few = ~crowded[i]
        i, j = i[few], j[few]
        least, most = _bounds(self, i, self, j, products[few])
        near = least <= _kth(most, i, count, k)[i]
        i, j, least, most = i[near], j[near], least[near], most[near]
        # only points that may be the k-th need an exact distance
        last = most >= _kth(least, i, count, k)[i]
        most[last] = _distances(self, i[last], self, j[last])
        self.radii = _kth(most, i, count, k)
        for some in crowded.nonzero()[:, 0].split(BLOCK):
            self.radii[some] = self._exact_radii(some, k)

    def _exact_radii(self, some_A: Tensor, k: int) -> Tensor:
        """The same for a few points by products in float64; (A,)."""
        exact = self.exact(some_A)
        nearest = exact.new_full((len(exact), k + 1), torch.inf)
        numbers = torch.zeros_like(nearest, dtype=torch.int64)
        for columns in _blocks(len(self.array), BLOCK):
            squares = torch.cat([nearest, _exact_squares(exact, self.exact(columns))], 1)
            new = torch.arange(columns.start, columns.stop, device=exact.device)
            nearest, places = squares.topk(k + 1, 1, largest=False)
            numbers = torch.cat([numbers, new.expand(len(exact), -1)], 1).gather(1, places)
        i = some_A.repeat_interleave(k + 1)
        return _distances(self, i, self, numbers.flatten()).view(-1, k + 1).amax(1)


class _Block(NamedTuple):
    """Distances between a few points of two sets."""

    left: _Points
    rows: slice
    right: _Points
    columns: slice
    products: Tensor
    """(A, B) of the rounded points."""
    least: Tensor
    """(A, B) float32: lower bounds of squared distances."""
    share: float

    @classmethod
    def of(
        cls, left: _Points, rows: slice, right: _Points, columns: slice, products_AB: Tensor
    ) -> _Block:
        share = max(left.share, right.share)
        lengths_A = left.squares[rows].float() * (1 - share) - TINY
        lengths_B = right.squares[columns].float() * (1 - share) - TINY
        least = torch.add(lengths_B, products_AB, alpha=-2).add_(lengths_A[:, None])
        return cls(left, rows, right, columns, products_AB, least, share)

    def transposed(self) -> _Block:
        least = self.least.T.contiguous()  # of which the minima take a tenth of the time
        products = self.products.T
        return _Block(self.right, self.columns, self.left, self.rows, products, least, self.share)

    def slack(self) -> tuple[Tensor, Tensor]:
        """(A,) and (B,) float64, whose sum is the distance of upper bounds from ``least``."""
        left, right = self.left.squares[self.rows], self.right.squares[self.columns]
        return 2 * self.share * left + 2 * TINY, 2 * self.share * right + 2 * TINY

    def candidates(self, nearest_NK: Tensor, counts_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of points that may be neighbours, and their products. Updates the upper bounds of
        the nearest distances of each point, and the number of its candidates, from which on it has
        no more."""
        k, size = nearest_NK.shape[1], self.least.shape[1]
        slack_A, slack_B = self.slack()
        most = self.least + slack_B.float()
        groups = min(size, GROUPS * k)
        most = most[:, : size // groups * groups].unflatten(1, (-1, groups)).amin(1)
        nearest = torch.cat([nearest_NK[self.rows], most + slack_A[:, None]], 1)
        nearest_NK[self.rows] = nearest.topk(k, 1, largest=False).values
        limits = nearest_NK[self.rows, -1].float()
        limits[counts_N[self.rows] > MAX_CANDIDATES * k] = -torch.inf
        near = self.least < limits[:, None]
        counts_N[self.rows] += near.sum(1)
        i, j = near.nonzero(as_tuple=True)
        few = counts_N[self.rows][i] <= MAX_CANDIDATES * k
        i, j = i[few], j[few]
        return i + self.rows.start, j + self.columns.start, self.products[i, j]


def _find_inside(block: _Block) -> None:
    """Find the points of ``block.left`` that are in one of the balls of ``block.right``."""
    left, right, rows = block.left, block.right, block.rows
    inside, radii_B = left.inside[rows], right.radii[block.columns]
    slack_A, slack_B = block.slack()
    inside |= (block.least - (radii_B - slack_B).float()).amin(1) <= -slack_A
    limits_B = (radii_B * (1 + 1e-6)).float()  # rounding errors of float32 are 1e-7
    i, j = ((block.least <= limits_B) & ~inside[:, None]).nonzero(as_tuple=True)
    of, to = i + rows.start, j + block.columns.start
    least, most = _bounds(left, of, right, to, block.products[i, j])
    left.inside[of[most <= right.radii[to]]] = True
    open_ = (least <= right.radii[to]) & ~left.inside[of]
    of, to = of[open_], to[open_]
    if len(of) > MAX_PAIRS * block.products.numel():
        # the ball that a point is nearest to decides
        of = of.unique()
        squares = _exact_squares(left.exact(of), right.exact(block.columns))
        to = (squares - radii_B).argmin(1) + block.columns.start
    close = _distances(left, of, right, to) <= right.radii[to] * (1 + ROUNDING)
    left.inside[of[close]] = True


def _bounds(
    left: _Points, i_P: Tensor, right: _Points, j_P: Tensor, products_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds (P,) of squared distances, in float64."""
    products = products_P.double()
    x, y, e, f = left.lengths[i_P], right.lengths[j_P], left.errors[i_P], right.errors[j_P]
    error = e * y + x * f + e * f + left.sum_error * (x + e) * (y + f)
    error += left.product_error * products.abs()
    lengths = left.squares[i_P] + right.squares[j_P]
    error = 2 * error + ROUNDING * lengths + TINY
    squares = lengths - 2 * products
    return squares - error, squares + error


def _kth(values_P: Tensor, numbers_P: Tensor, count: int, k: int) -> Tensor:
    """(count,): the k-th smallest of the values of each number, infinite where it has fewer."""
    order = values_P.argsort()
    order = order[numbers_P[order].argsort(stable=True)]
    numbers = numbers_P[order]
    starts = torch.searchsorted(numbers, torch.arange(count, device=numbers.device))
    last = torch.arange(len(order), device=order.device) - starts[numbers] == k - 1
    kth = values_P.new_full((count,), torch.inf)
    kth[numbers[last]] = values_P[order[last]]
    return kth


def _distances(left: _Points, i_P: Tensor, right: _Points, j_P: Tensor) -> Tensor:
    """Squared distances (P,) in float64 of pairs of points."""
    i, j = i_P.cpu().numpy(), j_P.cpu().numpy()
    squares = np.empty(len(i))
    for some in _blocks(len(i), ROWS):
        difference = left.array[i[some]].astype(np.float64)
        difference -= right.array[j[some]]
        squares[some] = np.einsum("ij,ij->i", difference, difference)
    return torch.from_numpy(squares * left.scale**2).to(i_P.device)


def _exact_squares(left_AD: Tensor, right_BD: Tensor) -> Tensor:
    """Squared distances (A, B) in float64."""
    lengths = left_AD.square().sum(1)[:, None] + right_BD.square().sum(1)
    return lengths.addmm_(left_AD, right_BD.T, alpha=-2)


def _read(points: np.ndarray, rows: slice | Tensor, centre_D: Tensor) -> Tensor:
    """Some points less the centre, in its dtype."""
    some = np.array(points[rows.cpu().numpy() if isinstance(rows, Tensor) else rows])
    return torch.from_numpy(some).to(centre_D).sub_(centre_D)


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
