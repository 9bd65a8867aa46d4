from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.evaluate.statistics import FeatureStatistics


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


@pytest.mark.parametrize("shift", [None, torch.full((5,), 1e8)])
def test_a_small_variance_far_from_zero_keeps_its_digits(shift: torch.Tensor | None) -> None:
    features = _features(50)
    statistics = _of(features + 1e8, shift=shift)
    expected = np.cov(features.numpy() + 1e8, rowvar=False)
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-7, atol=1e-8)
    naive = FeatureStatistics(5, shift=torch.zeros(5))
    naive.add(features + 1e8)
    assert not np.allclose(naive.covariance, expected, rtol=0.1)


def test_merging_two_shifts_is_seeing_both() -> None:
    features = _features(31)
    left, right = _of(features[:10]), _of(features[10:], shift=torch.ones(5))
    left.merge(right)
    left.merge(FeatureStatistics(5))
    whole = _of(features)
    assert left.count == 31
    torch.testing.assert_close(left.mean, whole.mean)
    torch.testing.assert_close(left.covariance, whole.covariance)
    empty = FeatureStatistics(5)
    empty.merge(whole)
    torch.testing.assert_close(empty.covariance, whole.covariance)


def test_states_of_workers_add_up() -> None:
    features, shift = _features(31), torch.arange(5.0)
    parts = [_of(part, shift=shift) for part in (features[:4], features[4:20], features[20:])]
    idle = FeatureStatistics(5, shift=shift)
    total = torch.stack([part.state() for part in [*parts, idle]]).sum(0)
    idle.load_state(total)
    assert idle.count == 31
    torch.testing.assert_close(idle.covariance, _of(features).covariance)
    torch.testing.assert_close(idle.mean, features.mean(0))
    parts[0].add(features[:1])  # what was loaded is a copy
    assert idle.state().equal(total)


def test_what_cannot_be_summed_is_refused() -> None:
    statistics = FeatureStatistics(5)
    with pytest.raises(ValueError, match=r"\(3, 4\), expected \(batch, 5\)"):
        statistics.add(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="not finite"):
        statistics.add(torch.full((3, 5), torch.nan))
    with pytest.raises(ValueError, match="no features"):
        _ = statistics.mean
    with pytest.raises(ValueError, match="shift"):
        statistics.load_state(torch.zeros(31))
    with pytest.raises(ValueError, match="width 4"):
        statistics.merge(FeatureStatistics(4))
    statistics.add(torch.zeros(0, 5))
    statistics.add(torch.zeros(1, 5))
    assert statistics.count == 1
    with pytest.raises(ValueError, match="at least 2"):
        _ = statistics.covariance
