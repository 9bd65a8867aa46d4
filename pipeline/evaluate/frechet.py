"""The Fréchet (2-Wasserstein) distance between two Gaussians."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

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
