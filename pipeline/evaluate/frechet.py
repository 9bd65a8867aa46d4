"""The Fréchet (2-Wasserstein) distance between two Gaussians."""

from __future__ import annotations

import math
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


def frechet_distance(a: HasMoments, b: HasMoments) -> float:
    """|m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)), not its root, as every FID
    (Dowson and Landau 1982, doi 10.1016/0047-259X(82)90077-X; Heusel et al., arXiv 1706.08500).

    With S = F F^T the last trace is the sum of the singular values of F_a^T F_b. That stays exact
    for singular covariances (fewer samples than dimensions), where the eigenvalues of a product
    are 0 up to 1e-16 and their square roots wrong by 1e-8 each. Raises ``ValueError`` where sizes
    differ or something is no mean or covariance.
    """
    mean_a, covariance_a = a.mean.double(), a.covariance.double()
    mean_b, covariance_b = b.mean.to(mean_a), b.covariance.to(mean_a)
    width = len(mean_a)
    for mean, covariance in ((mean_a, covariance_a), (mean_b, covariance_b)):
        if mean.shape != (width,) or covariance.shape != (width, width):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise ValueError(f"mean and covariance of shapes {shapes}; expected width {width}")
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise ValueError("a mean or covariance with numbers that are not finite")
    shift = (mean_a - mean_b).square().sum()
    traces = covariance_a.trace() + covariance_b.trace()
    # of images that are all alike only rounding is left, of sums about a mean that may be far away
    spread = max(float(covariance_a.abs().max()), float(covariance_b.abs().max()))
    scale = spread + float(shift)
    factors = [_factor(covariance, scale) for covariance in (covariance_a, covariance_b)]
    overlap = torch.linalg.svdvals(factors[0].T @ factors[1]).sum()
    distance = float(shift + traces - 2 * overlap)
    return max(0.0, distance) if math.isfinite(distance) else distance


def _factor(covariance: Tensor, scale: float) -> Tensor:
    """F (D, rank) with F F^T = covariance, up to what is rounding beside numbers of ``scale``."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    largest = values[-1].clamp(min=0)
    rounding = scale * len(values) * torch.finfo(values.dtype).eps
    if values[0] < -NOISE * largest - rounding:
        raise ValueError(f"a covariance with a negative eigenvalue ({values[0].item():.3g})")
    # what is below the resolution of float64 is a direction without variance
    keep = values > largest * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()
