from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full
from tqdm import tqdm

from pipeline.evaluate import precision_recall as module
from pipeline.evaluate.precision_recall import precision_recall


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Products as on CPUs with and without bfloat16."""
    chosen: torch.dtype = request.param
    monkeypatch.setattr(module, "_dtype", lambda device: chosen)
    return chosen


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
    k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 7)
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


def test_copies_are_at_distance_zero(dtype: torch.dtype) -> None:
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
def test_ties_are_decided_in_float64(
    k: int, pairs: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points of a coarse lattice far from zero: most distances equal a radius, and many points
    have copies. ``pairs`` 1 compares pair by pair, 0 whole blocks."""
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "ROWS", 32)
    monkeypatch.setattr(module, "MAX_PAIRS", pairs)
    rng = np.random.default_rng(k)
    samples = rng.integers(0, 4, (90, 3)).astype(np.float32) + 4096
    reference = rng.integers(1, 6, (70, 3)).astype(np.float32) + 4096
    found = precision_recall(samples, reference, k)
    assert found == _brute_force(samples.astype(np.float64), reference.astype(np.float64), k)
    assert 0 < found[1] < found[0]


def test_float64_decides_what_float32_cannot(dtype: torch.dtype) -> None:
    """A point that is 1e-9 nearer, or farther, than the radius of a ball among points that are
    100 away, for which float32 has errors of 1e-3."""
    reference = np.array([[0.0], [1.0], [100.0], [103.0]])
    found = []
    for shift in (1e-9, -1e-9):
        samples = np.array([[shift - 1], [50.0], [300.0], [500.0]])
        found.append(precision_recall(samples, reference, 1))
        assert found[-1] == _brute_force(samples, reference, 1)
    assert [precision for precision, _ in found] == [0.25, 0]


def _points(kind: str, count: int, width: int, rng: np.random.Generator) -> np.ndarray:
    points = rng.standard_normal((count, width))
    if kind == "copies":
        points = points[rng.integers(0, count // 4, count)]
    elif kind == "one point":
        points = np.full_like(points, 7)
    elif kind == "far":
        points += 1e4
    elif kind == "huge":
        points *= 1e25
    elif kind == "tiny":
        points *= 1e-30
    elif kind == "outliers":
        points[::9] *= 1e3
    elif kind == "two modes":
        points += 1e3 * rng.integers(0, 2, (count, 1))
    elif kind == "lattices":
        points = rng.integers(0, 3, (count, width)) + 4096.0 * rng.integers(0, 2, (count, 1))
    else:
        assert kind == "normal"
    return points


@pytest.mark.parametrize("candidates", [0, 2, 100])
@pytest.mark.parametrize(
    "kind",
    ["normal", "copies", "one point", "far", "huge", "tiny", "outliers", "two modes", "lattices"],
)
def test_all_kinds_of_points_agree_with_brute_force(
    kind: str, candidates: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets with points in common, of one and of many blocks, down to one point more than k;
    ``candidates`` 0 computes all radii by products in float64."""
    monkeypatch.setattr(module, "MAX_CANDIDATES", candidates)
    rng = np.random.default_rng(len(kind))
    for k, count, width, block in (
        (1, 40, 3, 16),
        (3, 61, 200, 13),
        (4, 5, 2, 64),
        (5, 50, 1, 64),
        (5, 8, 2, 3),
    ):
        monkeypatch.setattr(module, "BLOCK", block)
        samples, reference = (
            _points(kind, size, width, rng).astype(np.float32) for size in (count, count + 17)
        )
        reference[: count // 3] = samples[: count // 3]
        expected = _brute_force(samples.astype(np.float64), reference.astype(np.float64), k)
        assert precision_recall(samples, reference, k) == expected
        assert precision_recall(samples, samples, k) == (1, 1)


def test_points_are_not_their_own_neighbours_in_blocks_smaller_than_k(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 3)
    array = np.random.default_rng(0).standard_normal((10, 2)).astype(np.float32)
    points = module._Points(array, torch.zeros(2), 1 / 8, dtype)
    points.find_radii(5, tqdm(disable=True))
    distances = np.linalg.norm(array[:, None].astype(np.float64) - array, axis=-1)
    assert points.radii.sqrt().numpy() * 8 == pytest.approx(np.sort(distances, 1)[:, 5])


@pytest.mark.parametrize("width", [1, 3, 2048, 50_000])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_bounds_enclose_the_distances(width: int, mean: float, dtype: torch.dtype) -> None:
    """Of points near the centre and of points for which a product loses most digits; in bfloat16
    half of the bound is reached."""
    rng = np.random.default_rng(width)
    one, other = (rng.standard_normal((n, width)) + mean for n in (30, 20))
    one[:6] *= 1e-25  # the products of these underflow
    other[:6] *= 1e-25
    points = [
        module._Points(array.astype(np.float32), torch.zeros(width), 1 / 64, dtype)
        for array in (one, other)
    ]
    rows, columns = slice(4, 30), slice(1, 20)
    products = points[0].rounded(rows) @ points[1].rounded(columns).T
    block = module._Block.of(points[0], rows, points[1], columns, products)
    mode = "donot_use_mm_for_euclid_dist"
    exact = torch.cdist(points[0].exact(rows), points[1].exact(columns), compute_mode=mode).square()
    slack_A, slack_B = block.slack()
    assert (block.least <= exact).all()
    assert (block.least + slack_A[:, None] + slack_B >= exact).all()
    i, j = torch.ones_like(products).nonzero(as_tuple=True)
    least, most = module._bounds(points[0], i + 4, points[1], j + 1, products.flatten())
    assert (least <= exact.flatten()).all()
    assert (most >= exact.flatten()).all()
    assert (least >= block.least.flatten()).all()
    if dtype == torch.bfloat16 and width == 3:
        middle, half = (least + most) / 2, (most - least) / 2
        assert ((exact.flatten() - middle).abs() / half).max() > 0.5


def test_few_pairs_need_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    distances = module._distances

    def counted(left: Any, i: torch.Tensor, right: Any, j: torch.Tensor) -> torch.Tensor:
        nonlocal compared
        compared += len(i)
        return distances(left, i, right, j)

    monkeypatch.setattr(module, "_distances", counted)
    rng = np.random.default_rng(0)
    samples, reference = (rng.standard_normal((2, 1500, 64)) + 50).astype(np.float32)
    precision_recall(samples, reference)
    assert 3000 <= compared <= 3000 * (1.1 if dtype == torch.float32 else 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    points = np.ones((5, 2), np.float32)
    damaged = points.copy()
    damaged[4, 1] = value
    for sets in ((points, damaged), (damaged, points)):
        with pytest.raises(ValueError, match="not finite"):
            precision_recall(*sets)
