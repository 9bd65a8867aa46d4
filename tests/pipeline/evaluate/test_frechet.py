"""Fréchet distances against scipy's matrix square root and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from pipeline.evaluate.frechet import Factored, FeatureStatistics, Moments, frechet_distance


def _moments(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    return Moments(torch.from_numpy(np.asarray(mean)), torch.from_numpy(np.asarray(covariance)))


def _spread(rng: np.random.Generator, width: int, rank: int | None = None) -> np.ndarray:
    factor = rng.standard_normal((width, rank or 2 * width))
    return factor @ factor.T


def _rotation(rng: np.random.Generator, width: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((width, width)))[0]


def test_diagonal_gaussians() -> None:
    """sum (m_a - m_b)^2 + (s_a - s_b)^2 for standard deviations s."""
    rng = np.random.default_rng(0)
    means, deviations = rng.standard_normal((2, 9)), rng.uniform(0, 3, (2, 9))
    deviations[0, :2] = deviations[1, 1:4] = 0
    a, b = (_moments(m, np.diag(s**2)) for m, s in zip(means, deviations, strict=True))
    expected = ((means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)


def test_equal_covariances_leave_the_distance_of_the_means() -> None:
    rng = np.random.default_rng(1)
    covariance = _spread(rng, 12)
    means = rng.standard_normal((2, 12))
    a, b = (_moments(m, covariance) for m in means)
    expected = ((means[0] - means[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-11)


def test_covariances_that_commute() -> None:
    """The squared Frobenius norm of the difference of their square roots."""
    rng = np.random.default_rng(2)
    basis = _rotation(rng, 10)
    deviations = rng.uniform(0.1, 4, (2, 10))
    a, b = (_moments(np.zeros(10), basis @ np.diag(s**2) @ basis.T) for s in deviations)
    expected = ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_two_by_two_closed_form() -> None:
    """tr (A B)^(1/2) = sqrt(tr(A B) + 2 sqrt(det(A B))), by Cayley and Hamilton."""
    rng = np.random.default_rng(3)
    a, b = _spread(rng, 2), _spread(rng, 2)
    product = a @ b
    overlap = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    zero = np.zeros(2)
    expected = np.trace(a) + np.trace(b) - 2 * overlap
    assert frechet_distance(_moments(zero, a), _moments(zero, b)) == pytest.approx(expected)


@pytest.mark.parametrize("width", [1, 3, 40])
def test_scipys_square_root_agrees(width: int) -> None:
    rng = np.random.default_rng(width)
    covariances = [_spread(rng, width), _spread(rng, width)]
    means = rng.standard_normal((2, width))
    expected = ((means[0] - means[1]) ** 2).sum() + sum(map(np.trace, covariances))
    expected -= 2 * np.trace(sqrtm(covariances[0] @ covariances[1])).real
    a, b = (_moments(m, c) for m, c in zip(means, covariances, strict=True))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(a, Factored.of(b)) == frechet_distance(a, b)
    assert frechet_distance(Factored.of(a), b) == frechet_distance(a, b)


def test_covariances_without_full_rank() -> None:
    """Orthogonal subspaces do not overlap; in a common subspace the distance is that of the
    subspace. Square roots of the product's eigenvalues have an error of 1e-6 here."""
    rng = np.random.default_rng(4)
    width = 60
    basis, zero = _rotation(rng, width), np.zeros(width)
    small = [_spread(rng, 5), _spread(rng, 5)]
    left = _moments(zero, basis[:, :5] @ small[0] @ basis[:, :5].T)
    right = _moments(zero, basis[:, 5:10] @ small[1] @ basis[:, 5:10].T)
    expected = np.trace(small[0]) + np.trace(small[1])
    assert frechet_distance(left, right) == pytest.approx(expected, rel=1e-12)
    same = _moments(zero, basis[:, :5] @ small[1] @ basis[:, :5].T)
    inside = frechet_distance(_moments(np.zeros(5), small[0]), _moments(np.zeros(5), small[1]))
    assert frechet_distance(left, same) == pytest.approx(inside, rel=1e-11)


def test_fewer_samples_than_dimensions() -> None:
    """Few features, against scipy (up to the error of its root, 1e-6)."""
    rng = np.random.default_rng(5)
    sets = [rng.standard_normal((n, 30)) for n in (8, 12)]
    statistics = []
    for features in sets:
        one = FeatureStatistics(30)
        one.add(torch.from_numpy(features))
        statistics.append(one)
    a, b = (np.cov(features, rowvar=False) for features in sets)
    difference = sets[0].mean(0) - sets[1].mean(0)
    # the product of the roots instead of the root of the product, because it is well defined
    overlap = np.linalg.svd(sqrtm(a).real @ sqrtm(b).real, compute_uv=False).sum()
    expected = difference @ difference + np.trace(a + b) - 2 * overlap
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-6)


def test_points_without_spread() -> None:
    a, b = (_moments(m, np.zeros((3, 3))) for m in (np.zeros(3), np.full(3, 2.0)))
    assert frechet_distance(a, b) == 12


def test_matrices_that_are_not_covariances_are_refused() -> None:
    good = _moments(np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="negative eigenvalue"):
        frechet_distance(good, _moments(np.zeros(3), np.diag([1.0, 1.0, -0.5])))
    with pytest.raises(ValueError, match="negative eigenvalue"):
        frechet_distance(good, _moments(np.zeros(3), -np.eye(3)))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(good, _moments(np.zeros(3), np.full((3, 3), np.nan)))
    with pytest.raises(ValueError, match="expected width 3"):
        frechet_distance(good, _moments(np.zeros(4), np.eye(4)))


@pytest.mark.parametrize("count", [20, 200])
def test_torch_fidelity_agrees(count: int) -> None:
    """Also with fewer samples than dimensions."""
    rng = np.random.default_rng(count)
    sets = [torch.from_numpy(rng.standard_normal((count, 64)) * s) for s in (1.0, 1.5)]
    torch_fidelity = fid_statistics_to_metric(*map(fid_features_to_statistics, sets), verbose=False)
    statistics = [FeatureStatistics(64), FeatureStatistics(64)]
    for one, features in zip(statistics, sets, strict=True):
        one.add(features)
    expected = torch_fidelity["frechet_inception_distance"]
    assert frechet_distance(*statistics) == pytest.approx(expected, rel=1e-5)


def test_equal_images_have_a_distance() -> None:
    """Images of a collapsed student: about another set's mean, the covariance has only rounding
    errors, with negative eigenvalues."""
    rng = torch.Generator().manual_seed(0)
    real = FeatureStatistics(48)
    real.add(torch.randn(200, 48, generator=rng) + 3)
    alike = FeatureStatistics(48, shift=real.mean)
    alike.add(torch.rand(1, 48, generator=rng).expand(50, 48))
    expected = (alike.mean - real.mean).square().sum() + real.covariance.trace()
    assert frechet_distance(alike, real) == pytest.approx(float(expected), rel=1e-5)


def test_factored_arguments_are_not_factored_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    real = Factored.of(_moments(np.zeros(8), _spread(rng, 8)))
    factorings = []
    factor = torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda m: factorings.append(len(m)) or factor(m)
    )
    for _ in range(3):
        assert frechet_distance(_moments(np.zeros(8), _spread(rng, 8)), real) > 0
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-11)
    assert factorings == [8, 8, 8]


def test_a_factored_covariance_is_checked() -> None:
    bad = Factored.of(_moments(np.zeros(3), np.diag([1.0, 1.0, -0.5])))
    with pytest.raises(ValueError, match="negative eigenvalue"):
        frechet_distance(_moments(np.zeros(3), np.eye(3)), bad)


def _features(count: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((count, width)) @ rng.standard_normal((width,) * 2))


def _of(features: torch.Tensor, batch: int = 7, **kwargs: object) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1], **kwargs)
    for part in features.split(batch):
        statistics.add(part)
    return statistics


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_streamed_moments_are_numpys(batch: int) -> None:
    features = _features(23)
    statistics = _of(features, batch)
    assert statistics.count == 23
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-13)
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 5, 6, 40])
def test_moments_of_held_rows_and_of_blocks_are_numpys(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows are summed and some held, in blocks of odd widths, and moments may be read at any
    time."""
    monkeypatch.setattr("pipeline.evaluate.frechet.ROWS", 6)
    monkeypatch.setattr("pipeline.evaluate.frechet.BLOCK", 3)
    features = torch.randn(40, 13, generator=torch.Generator().manual_seed(batch)) + 3
    statistics = FeatureStatistics(13)
    for begin in range(0, 40, batch):
        statistics.add(features[begin : begin + batch])
        end = min(begin + batch, 40)
        assert statistics.count == end
        if end > 1 and end % 3:
            expected = np.cov(features[:end].double().numpy(), rowvar=False)
            np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-12, atol=1e-13)
    assert statistics.covariance.equal(statistics.covariance.T)
    np.testing.assert_allclose(statistics.mean, features.double().mean(0), rtol=1e-13)


@pytest.mark.parametrize("ratio", [1e-1, 1e-3, 1e-5])
def test_roots_of_eigenvalues_are_taken_where_they_are_exact(
    ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against commuting covariances whose smallest deviation is ``ratio`` of the largest. Of the
    last, eigenvalues of the product have no correct digit."""
    rng = np.random.default_rng(7)
    basis, calls, svdvals = _rotation(rng, 30), [], torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda m: calls.append(1) or svdvals(m))
    deviations = np.stack([np.geomspace(1, ratio, 30), np.geomspace(2, ratio, 30)])
    a, b = (_moments(np.zeros(30), basis @ np.diag(s**2) @ basis.T) for s in deviations)
    expected = ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert len(calls) == (ratio == 1e-5)


@pytest.mark.parametrize("shift", [None, torch.full((5,), 1e8)])
def test_a_small_variance_far_from_zero_is_accurate(shift: torch.Tensor | None) -> None:
    features = _features(50)
    statistics = _of(features + 1e8, shift=shift)
    expected = np.cov(features.numpy() + 1e8, rowvar=False)
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-7, atol=1e-8)
    naive = FeatureStatistics(5, shift=torch.zeros(5))
    naive.add(features + 1e8)
    assert not np.allclose(naive.covariance, expected, rtol=0.1)


def test_states_of_workers_can_be_added() -> None:
    features, shift = _features(31), torch.arange(5.0)
    parts = [_of(part, shift=shift) for part in (features[:4], features[4:20], features[20:])]
    idle = FeatureStatistics(5, shift=shift)
    total = torch.stack([part.state() for part in [*parts, idle]]).sum(0)
    idle.load_state(total)
    assert idle.count == 31
    torch.testing.assert_close(idle.covariance, _of(features).covariance)
    torch.testing.assert_close(idle.mean, features.mean(0))
    parts[0].add(features[:1])  # load_state copies
    assert idle.state().equal(total)


def test_bad_features_and_states_are_refused() -> None:
    statistics = FeatureStatistics(5)
    with pytest.raises(ValueError, match=r"\(3, 4\), expected \(batch, 5\)"):
        statistics.add(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="not finite"):
        statistics.add(torch.full((3, 5), torch.nan))
    with pytest.raises(ValueError, match="no features"):
        _ = statistics.mean
    with pytest.raises(ValueError, match="shift"):
        statistics.load_state(torch.zeros(31))
    statistics.add(torch.zeros(0, 5))
    statistics.add(torch.zeros(1, 5))
    assert statistics.count == 1
    with pytest.raises(ValueError, match="at least 2"):
        _ = statistics.covariance
