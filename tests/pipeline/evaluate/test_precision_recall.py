from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from pipeline.evaluate.precision_recall import precision_recall


def _brute_force(samples: np.ndarray, reference: np.ndarray, k: int) -> tuple[float, float]:
    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a[:, None] - b[None], axis=-1)

    def radii(points: np.ndarray) -> np.ndarray:
        return np.sort(distances(points, points), axis=1)[:, k]

    between = distances(samples, reference)
    precision = (between <= radii(reference)[None]).any(1).mean()
    return precision, (between <= radii(samples)[:, None]).any(0).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_blocks_agree_with_brute_force_and_torch_fidelity(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluate.precision_recall.BLOCK_ROWS", 7)
    monkeypatch.setattr("pipeline.evaluate.precision_recall.BLOCK_COLUMNS", 11)
    rng = np.random.default_rng(k)
    samples = rng.standard_normal((50, 4)).astype(np.float32)
    reference = (1.3 * rng.standard_normal((64, 4)) + 0.7).astype(np.float32)
    found = precision_recall(samples, reference, k)
    assert found == pytest.approx(_brute_force(samples, reference, k))
    assert found != pytest.approx(found[::-1])  # precision and recall differ
    torch_fidelity = calculate_precision_recall_full(
        torch.from_numpy(samples), torch.from_numpy(reference), neighborhood=k
    )
    assert found == pytest.approx(torch_fidelity)


def test_equal_and_distant_sets() -> None:
    points = np.random.default_rng(0).standard_normal((30, 6)).astype(np.float32)
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points, points + 1000) == (0, 0)


def test_one_of_two_modes_has_full_precision_and_half_recall() -> None:
    """Clusters 100 apart: samples lie in one, the reference is half in each."""
    rng = np.random.default_rng(1)
    one, other = rng.uniform(0, 1, (2, 40, 3)).astype(np.float32)
    reference = np.concatenate([one, other + 100])
    precision, recall = precision_recall(one, reference)
    assert (precision, recall) == (1, 0.5)
    assert precision_recall(reference, one) == (0.5, 1)


def test_copies_are_at_distance_zero() -> None:
    """A generator that repeats one image: balls of radius 0 contain only that image."""
    rng = np.random.default_rng(2)
    reference = (rng.standard_normal((20, 300)) + 50).astype(np.float32)
    collapsed = np.repeat(reference[:1], 20, axis=0)
    assert precision_recall(collapsed, reference) == (1, 1 / 20)


def test_memory_maps_are_accepted_and_few_points_refused(tmp_path: Path) -> None:
    points = np.random.default_rng(3).standard_normal((9, 2)).astype(np.float32)
    np.save(tmp_path / "points.npy", points)
    mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
    assert precision_recall(mapped, points) == (1, 1)
    with pytest.raises(ValueError, match="3 points have no 3-th neighbour"):
        precision_recall(points, points[:3])


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("pairs", [1.0, 0.0])
def test_ties_are_decided_in_float64(k: int, pairs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points of a coarse lattice far from zero: most distances equal a radius, and many points
    have copies. ``pairs`` 1 compares pair by pair, 0 whole blocks."""
    monkeypatch.setattr("pipeline.evaluate.precision_recall.BLOCK_ROWS", 16)
    monkeypatch.setattr("pipeline.evaluate.precision_recall.BLOCK_COLUMNS", 40)
    monkeypatch.setattr("pipeline.evaluate.precision_recall.PAIRS", 32)
    monkeypatch.setattr("pipeline.evaluate.precision_recall.MAX_PAIRS", pairs)
    rng = np.random.default_rng(k)
    samples = rng.integers(0, 4, (90, 3)).astype(np.float32) + 4096
    reference = rng.integers(1, 6, (70, 3)).astype(np.float32) + 4096
    found = precision_recall(samples, reference, k)
    assert found == _brute_force(samples.astype(np.float64), reference.astype(np.float64), k)
    assert 0 < found[1] < found[0]


def test_float64_decides_what_float32_cannot() -> None:
    """A point that is 1e-9 nearer, or farther, than the radius of a ball among points that are
    100 away, for which float32 has errors of 1e-3."""
    reference = np.array([[0.0], [1.0], [100.0], [103.0]])
    found = []
    for shift in (1e-9, -1e-9):
        samples = np.array([[shift - 1], [50.0], [300.0], [500.0]])
        found.append(precision_recall(samples, reference, 1))
        assert found[-1] == _brute_force(samples, reference, 1)
    assert [precision for precision, _ in found] == [0.25, 0]
