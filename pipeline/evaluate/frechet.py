"""The Fréchet (2-Wasserstein) distance between two Gaussians, and their moments from features."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.precision import is_finite

MAX_NEGATIVE_SHARE = 1e-3
"""A negative eigenvalue up to this share of the largest one is a rounding error, as in statistics
stored in float32; with a larger one a matrix is not a covariance."""

CLEARLY_POSITIVE = 1e-10
"""Smallest square of a pivot of Cholesky's factor, as a share of the trace, from which on all
directions of a covariance are beyond rounding errors (width * 2e-16)."""

MAX_ERROR = 1e-7
"""Estimated error of a distance, as a share of it, up to which singular values are computed as the
roots of eigenvalues, in a fifth of the time."""

ROWS = 1024
"""Features that are multiplied at a time: sums of fewer take most of their time in memory."""
BLOCK = 256
"""Width of the blocks on the diagonal of which a product fills both halves."""


def frechet_distance(a: HasMoments | Factored, b: HasMoments | Factored) -> float:
    """|m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)), without a square root, as in every
    FID (Dowson and Landau 1982, doi 10.1016/0047-259X(82)90077-X; Heusel et al., arXiv 1706.08500).

    With S = F F^T the last trace is the sum of the singular values of F_a^T F_b. This is exact for
    singular covariances (fewer samples than dimensions), where the eigenvalues of the product are 0
    up to 1e-16, so that each square root has an error of 1e-8. Elsewhere these roots are summed, if
    their error is below ``MAX_ERROR``. A ``Factored`` argument is not factored again. Computed on
    the device of ``a``. Raises ``ValueError`` where widths differ or an argument is not a mean and
    covariance.
    """
    one = a if isinstance(a, Factored) else Factored.of(a)
    device = one.mean.device
    other = b.to(device) if isinstance(b, Factored) else Factored.of(b, device)
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"means of width {len(other.mean)}; expected width {len(one.mean)}")
    shift = (one.mean - other.mean).square().sum()
    # equal images leave only the rounding errors of sums about a mean that may be far from zero
    scale = max(one.max_magnitude, other.max_magnitude) + float(shift)
    for gaussian in (one, other):
        gaussian.check(scale)
    product = one.factor.T @ other.factor
    known = float(shift + (one.trace + other.trace))
    overlap, error = _sum_of_roots(product)
    if not 2 * error <= MAX_ERROR * (known - 2 * overlap):
        overlap = float(torch.linalg.svdvals(product).sum())
    distance = known - 2 * overlap
    return max(0.0, distance) if math.isfinite(distance) else distance


def _sum_of_roots(matrix: Tensor) -> tuple[float, float]:
    """The sum of a square matrix's singular values, from the eigenvalues of its product with its
    transpose, and an estimate of its error: that of each eigenvalue is 2e-16 of the largest.
    Infinite where an eigenvalue is not positive, or the matrix is not square."""
    if matrix.shape[0] != matrix.shape[1] or not is_finite(matrix):
        return 0.0, math.inf
    upper = torch.zeros_like(matrix)
    add_products(upper, matrix.T)
    values = torch.linalg.eigvalsh(upper, UPLO="U")
    if not len(values) or values[0] <= 0:
        return 0.0, math.inf
    roots = values.sqrt()
    error = torch.finfo(values.dtype).eps * values[-1] * (0.5 / roots).sum()
    return float(roots.sum()), float(error)


def add_products(upper_DD: Tensor, features_ND: Tensor) -> None:
    """Add X^T X to the upper triangle of a matrix, in little more than half of the operations of
    the whole product; below the diagonal some of it is added, too."""
    width = features_ND.shape[1]
    if width <= BLOCK:
        upper_DD.addmm_(features_ND.T, features_ND)
        return
    half = width // 2
    left, right = features_ND[:, :half], features_ND[:, half:]
    upper_DD[:half, half:].addmm_(left.T, right)
    add_products(upper_DD[:half, :half], left)
    add_products(upper_DD[half:, half:], right)


class HasMoments(Protocol):
    """Interface of ``Moments`` and ``FeatureStatistics``."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def covariance(self) -> Tensor: ...


class Moments(NamedTuple):
    """Mean and covariance of a set of features."""

    mean: Tensor
    """(D,) float64."""
    covariance: Tensor
    """(D, D) float64, symmetric."""


@dataclass(frozen=True)
class Factored:
    """A Gaussian with a factored covariance S. Factoring is most of the work of a distance, so that
    a Gaussian that many others are compared with is factored once."""

    mean: Tensor
    """(D,) float64."""
    factor: Tensor
    """F (D, rank) with F F^T = S, without directions below the resolution of float64."""
    trace: Tensor
    """Trace of S, a scalar."""
    max_magnitude: float
    """Largest magnitude in S."""
    min_eigenvalue: float
    """Smallest eigenvalue of S, which rounding errors may make negative; 0 where none is."""
    max_eigenvalue: float
    """Largest eigenvalue of S, or its trace where no eigenvalue is negative."""

    @classmethod
    def of(cls, moments: HasMoments, device: torch.device | str | None = None) -> Factored:
        """Factor ``moments`` on ``device``, by default the mean's. Raises ``ValueError`` where the
        shapes do not match or values are not finite."""
        mean = moments.mean.to(device, torch.float64)
        covariance = moments.covariance.to(mean)
        width = len(mean)
        if mean.shape != (width,) or covariance.shape != (width, width):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise ValueError(f"mean and covariance of shapes {shapes}; expected width {width}")
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise ValueError("a mean or covariance with values that are not finite")
        covariance = (covariance + covariance.T) / 2
        lower, failed = torch.linalg.cholesky_ex(covariance)
        least, trace = lower.diagonal().square().min(), covariance.trace()
        if not failed and least > CLEARLY_POSITIVE * trace:
            # S is far from singular, and F its triangular factor, in a hundredth of the time
            return cls(
                mean=mean,
                factor=lower,
                trace=trace,
                max_magnitude=float(covariance.abs().max()),
                min_eigenvalue=0.0,
                max_eigenvalue=float(trace),
            )
        values, vectors = torch.linalg.eigh(covariance)
        # an eigenvalue below the resolution of float64 is a direction without variance
        keep = values > values[-1].clamp(min=0) * width * torch.finfo(values.dtype).eps
        return cls(
            mean=mean,
            factor=vectors[:, keep] * values[keep].sqrt(),
            trace=trace,
            max_magnitude=float(covariance.abs().max()),
            min_eigenvalue=float(values[0]),
            max_eigenvalue=float(values[-1]),
        )

    def to(self, device: torch.device) -> Factored:
        """A copy on ``device``."""
        mean, factor, trace = (x.to(device) for x in (self.mean, self.factor, self.trace))
        return replace(self, mean=mean, factor=factor, trace=trace)

    def check(self, scale: float) -> None:
        """Raises ``ValueError`` where S has a negative eigenvalue beyond the rounding errors of
        numbers of magnitude ``scale``."""
        rounding = scale * len(self.mean) * torch.finfo(torch.float64).eps
        if self.min_eigenvalue < -MAX_NEGATIVE_SHARE * max(self.max_eigenvalue, 0.0) - rounding:
            raise ValueError(f"a covariance with a negative eigenvalue ({self.min_eigenvalue:.3g})")


class FeatureStatistics:
    """Running sums of features (B, D) about a fixed point, the shift.

    The shift avoids the cancellation of large sums where the variance is small. Because it is
    fixed, sums of several processes can be added: give each process the same ``shift`` (for example
    the reference's mean), add ``state()`` over the processes and ``load_state`` the result. The
    default shift is the mean of the first batch. ``ROWS`` features are held until they are summed.
    """

    def __init__(
        self, width: int, *, shift: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """``width`` is D, ``shift`` has shape (D,). Sums are float64 on ``device``."""
        if shift is not None and shift.shape != (width,):
            raise ValueError(f"a shift of shape {tuple(shift.shape)} for features of width {width}")
        self.width = width
        self.shift = None if shift is None else shift.to(device, torch.float64)
        self._count = self._held = 0
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._outer = torch.zeros(width, width, dtype=torch.float64, device=device)
        """Only its upper triangle is complete."""
        self._rows = torch.empty(0, width, dtype=torch.float64, device=device)
        """About the shift; the first ``_held`` have not been summed."""

    @property
    def count(self) -> int:
        """Number of features added."""
        return self._count

    def add(self, features_BD: Tensor) -> None:
        """Add a batch of any float type, on any device. Raises ``ValueError`` for other shapes and
        for values that are not finite."""
        if features_BD.ndim != 2 or features_BD.shape[1] != self.width:
            shape = tuple(features_BD.shape)
            raise ValueError(f"features of shape {shape}, expected (batch, {self.width})")
        if not len(features_BD):
            return
        features = features_BD.detach().to(self._sum.device)
        if not is_finite(features):
            raise ValueError("features that are not finite")
        if self.shift is None:
            self.shift = features.mean(0, dtype=torch.float64)
        self._count += len(features)
        if not len(self._rows):
            self._rows = self._rows.new_empty(ROWS, self.width)
        while len(features):
            part, features = features[: ROWS - self._held], features[ROWS - self._held :]
            end = self._held + len(part)
            torch.sub(part, self.shift, out=self._rows[self._held : end])
            self._held = end
            if end == ROWS:
                self._sum_rows()

    def _sum_rows(self) -> None:
        rows = self._rows[: self._held]
        self._sum += rows.sum(0)
        add_products(self._outer, rows)
        self._held = 0

    def state(self) -> Tensor:
        """(1 + D + D * D,) float64: count, sum and sum of outer products about the shift. States
        of several processes can be added if all have the same ``shift``."""
        self._sum_rows()
        count = self._sum.new_tensor([self._count])
        return torch.cat([count, self._sum, self._outer.flatten()])

    def load_state(self, state: Tensor) -> None:
        """Replace the sums by ``state()`` of this shift, or by an addition of such states."""
        if self.shift is None:
            raise ValueError("a state needs the shift that its sums are about")
        if state.shape != (1 + self.width * (1 + self.width),):
            raise ValueError(f"a state of shape {tuple(state.shape)} for width {self.width}")
        state = state.to(self._sum.device, torch.float64)
        self._count, self._held = round(state[0].item()), 0
        self._sum = state[1 : 1 + self.width].clone()
        self._outer = state[1 + self.width :].reshape(self.width, self.width).clone()

    @property
    def mean(self) -> Tensor:
        """(D,) float64. Raises ``ValueError`` before the first feature."""
        if self.shift is None or not self._count:
            raise ValueError("no features have been added, so there is no mean")
        self._sum_rows()
        return self.shift + self._sum / self._count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased (divided by n - 1) as in ``numpy.cov`` and in FIDs. Raises
        ``ValueError`` for fewer than two features."""
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 features, not {self._count}")
        self._sum_rows()
        upper = (self._outer - torch.outer(self._sum, self._sum) / self._count).triu()
        return (upper + upper.triu(1).T) / (self._count - 1)

    def moments(self) -> Moments:
        """Mean and covariance. Raises ``ValueError`` for fewer than two features."""
        return Moments(self.mean, self.covariance)
