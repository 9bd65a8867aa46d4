"""The Fréchet (2-Wasserstein) distance between two Gaussians."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

NOISE = 1e-3
"""A negative eigenvalue up to this share of the largest is rounding, as in statistics that were
stored in float32 or half a library away; a larger one is no covariance."""


class HasMoments(Protocol):
    """``Moments`` and ``FeatureStatistics`` are such."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def covariance(self) -> Tensor: ...


@dataclass(frozen=True)
class Factored:
    """A Gaussian whose covariance S has been factored, which is most of the work of a distance:
    for one that many others are compared with."""

    mean: Tensor
    """(D,) float64."""
    factor: Tensor
    """F (D, rank) with F F^T = S; directions below the resolution of float64 are left out."""
    trace: Tensor
    """Of S, a scalar."""
    spread: float
    """The largest magnitude in S."""
    lowest: float
    """The least eigenvalue, which rounding may make negative."""
    highest: float
    """The largest."""

    @classmethod
    def of(cls, moments: HasMoments, device: torch.device | str | None = None) -> Factored:
        """On the mean's device, or ``device``. Raises ``ValueError`` where sizes differ or numbers
        are not finite."""
        mean = moments.mean.to(device, torch.float64)
        covariance = moments.covariance.to(mean)
        width = len(mean)
        if mean.shape != (width,) or covariance.shape != (width, width):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise ValueError(f"mean and covariance of shapes {shapes}; expected width {width}")
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise ValueError("a mean or covariance with numbers that are not finite")
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        # what is below the resolution of float64 is a direction without variance
        keep = values > values[-1].clamp(min=0) * width * torch.finfo(values.dtype).eps
        return cls(
            mean=mean,
            factor=vectors[:, keep] * values[keep].sqrt(),
            trace=covariance.trace(),
            spread=float(covariance.abs().max()),
            lowest=float(values[0]),
            highest=float(values[-1]),
        )

    def to(self, device: torch.device) -> Factored:
        """The same there."""
        mean, factor, trace = (x.to(device) for x in (self.mean, self.factor, self.trace))
        return Factored(mean, factor, trace, self.spread, self.lowest, self.highest)

    def check(self, scale: float) -> None:
        """Raises ``ValueError`` where S has a negative eigenvalue that is more than rounding beside
        numbers of ``scale``."""
        rounding = scale * len(self.mean) * torch.finfo(torch.float64).eps
        if self.lowest < -NOISE * max(self.highest, 0.0) - rounding:
            raise ValueError(f"a covariance with a negative eigenvalue ({self.lowest:.3g})")


def frechet_distance(a: HasMoments | Factored, b: HasMoments | Factored) -> float:
    """|m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)), not its root, as every FID
    (Dowson and Landau 1982, doi 10.1016/0047-259X(82)90077-X; Heusel et al., arXiv 1706.08500).

    With S = F F^T the last trace is the sum of the singular values of F_a^T F_b. That stays exact
    for singular covariances (fewer samples than dimensions), where the eigenvalues of a product
    are 0 up to 1e-16 and their square roots wrong by 1e-8 each. What is ``Factored`` already is not
    factored again. Computed on the device of ``a``. Raises ``ValueError`` where sizes differ or
    something is no mean or covariance.
    """
    one = a if isinstance(a, Factored) else Factored.of(a)
    device = one.mean.device
    other = b.to(device) if isinstance(b, Factored) else Factored.of(b, device)
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"means of width {len(other.mean)}; expected width {len(one.mean)}")
    shift = (one.mean - other.mean).square().sum()
    # of images that are all alike only rounding is left, of sums about a mean that may be far away
    scale = max(one.spread, other.spread) + float(shift)
    for gaussian in (one, other):
        gaussian.check(scale)
    overlap = torch.linalg.svdvals(one.factor.T @ other.factor).sum()
    distance = float(shift + (one.trace + other.trace) - 2 * overlap)
    return max(0.0, distance) if math.isfinite(distance) else distance


class Moments(NamedTuple):
    """A Gaussian: what the Fréchet distance knows of a set of features."""

    mean: Tensor
    """(D,) float64."""
    covariance: Tensor
    """(D, D) float64, symmetric."""


class FeatureStatistics:
    """Running sums of features (B, D) about a fixed point, the shift.

    The shift keeps the difference of large sums from eating the digits of a small variance, and
    being fixed it lets sums of several processes simply be added: give each the same ``shift`` (the
    reference's mean, say), sum ``state()`` over them and ``load_state`` the result. Where no shift
    is given the first batch's mean becomes it; ``merge`` takes any two.
    """

    def __init__(
        self, width: int, *, shift: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """``width`` is D; ``shift`` is (D,). Sums live on ``device``, in float64."""
        if shift is not None and shift.shape != (width,):
            raise ValueError(f"a shift of shape {tuple(shift.shape)} for features of width {width}")
        self.width = width
        self.shift = None if shift is None else shift.to(device, torch.float64)
        self._count = 0
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    @property
    def count(self) -> int:
        """Features so far."""
        return self._count

    def add(self, features_BD: Tensor) -> None:
        """Take in a batch, of any float type and device. Raises ``ValueError`` on other shapes and
        on numbers that are not finite."""
        if features_BD.ndim != 2 or features_BD.shape[1] != self.width:
            shape = tuple(features_BD.shape)
            raise ValueError(f"features of shape {shape}, expected (batch, {self.width})")
        if not len(features_BD):
            return
        features = features_BD.detach().to(self._sum.device, torch.float64)
        if not torch.isfinite(features).all():
            raise ValueError("features that are not finite numbers")
        if self.shift is None:
            self.shift = features.mean(0)
        centred = features - self.shift
        self._count += len(centred)
        self._sum += centred.sum(0)
        self._outer.addmm_(centred.T, centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Take in what ``other`` has seen, whatever its shift: exact up to rounding."""
        if other.width != self.width:
            raise ValueError(f"features of width {other.width} cannot join those of {self.width}")
        if other.shift is None or not other.count:
            return
        device = self._sum.device
        if self.shift is None:
            self.shift = other.shift.to(device)
        move = other.shift.to(device) - self.shift
        total, outer = other._sum.to(device), other._outer.to(device)
        cross = torch.outer(total, move)
        self._count += other.count
        self._sum += total + other.count * move
        self._outer += outer + cross + cross.T + other.count * torch.outer(move, move)

    def state(self) -> Tensor:
        """(1 + D + D * D,) float64: count, sum and sum of outer products about the shift. The
        states of several processes add up where all were given the same ``shift``."""
        count = self._sum.new_tensor([self._count])
        return torch.cat([count, self._sum, self._outer.flatten()])

    def load_state(self, state: Tensor) -> None:
        """Replace the sums by those of ``state()``, or of a sum of them, about this shift."""
        if self.shift is None:
            raise ValueError("sums mean nothing without the shift that they are about")
        if state.shape != (1 + self.width * (1 + self.width),):
            raise ValueError(f"a state of shape {tuple(state.shape)} for width {self.width}")
        state = state.to(self._sum.device, torch.float64)
        self._count = round(state[0].item())
        self._sum = state[1 : 1 + self.width].clone()
        self._outer = state[1 + self.width :].reshape(self.width, self.width).clone()

    @property
    def mean(self) -> Tensor:
        """(D,) float64. Raises ``ValueError`` before the first feature."""
        if self.shift is None or not self._count:
            raise ValueError("no features, no mean")
        return self.shift + self._sum / self._count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased (divided by n - 1) as ``numpy.cov``'s and every FID's. Raises
        ``ValueError`` where there are fewer than two features."""
        if self._count < 2:
            raise ValueError(f"{self._count} features have no covariance: at least 2 are needed")
        scatter = self._outer - torch.outer(self._sum, self._sum) / self._count
        return (scatter + scatter.T) / (2 * (self._count - 1))

    def moments(self) -> Moments:
        """Mean and covariance; raises as they do."""
        return Moments(self.mean, self.covariance)
