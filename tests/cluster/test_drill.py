"""The drill of losing nodes, and that its comparison finds what it is there for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from schemas.errors import UserError
from tests.cluster.__main__ import drill, main
from tests.cluster.drill import BATCH, WEIGHT_TOLERANCE, Drill, compare
from tests.cluster.options import DrillOptions

STEPS = 4
Rows = list[dict[str, float]]


def rows() -> Rows:
    return [
        {"step": n, "denoising": 1 / n, "feature": -0.5, "grad_norm": 1.0} for n in (1, 2, 3, 4)
    ]


def checkpoint(folder: Path, weights: torch.Tensor, samples: int = STEPS * BATCH) -> Path:
    folder.mkdir()
    save_file({"weight": weights}, folder / "model.safetensors")
    (folder / "state.json").write_text(json.dumps({"samples_consumed": samples}))
    return folder


def compared(tmp_path: Path, found: Rows, weights: torch.Tensor, samples: int) -> Drill:
    result = Drill(steps=STEPS)
    final = checkpoint(tmp_path / "final", weights, samples)
    compare(result, found, rows(), final, checkpoint(tmp_path / "whole", torch.ones(4)))
    return result


def test_an_equal_run_has_no_problems(tmp_path: Path) -> None:
    found = [row | {"denoising": row["denoising"] * (1 + 1e-6)} for row in rows()]
    result = compared(tmp_path, found, torch.ones(4) * (1 + 1e-5), STEPS * BATCH)
    assert result.problems == []
    assert result.worst_loss == pytest.approx(1e-6, rel=1e-3)
    assert result.weights == pytest.approx(1e-5, rel=0.02)  # float32


@pytest.mark.parametrize(
    ("change", "factor", "samples", "problems"),
    [
        (lambda r: r[:2] + r[3:], 1.0, 48, ["steps are missing", "losses differ"]),
        (lambda r: [*r, r[1]], 1.0, 48, ["steps are there twice"]),
        (lambda r: [*r[:3], r[3] | {"feature": -0.51}], 1.0, 48, ["losses differ"]),
        (lambda r: r, 1.0, 60, ["the samples are not those of the steps"]),
        (lambda r: r, 1 + 2 * WEIGHT_TOLERANCE, 48, ["weights differ"]),
    ],
)
def test_a_difference_is_found(
    tmp_path: Path,
    change: Callable[[Rows], Rows],
    factor: float,
    samples: int,
    problems: list[str],
) -> None:
    result = compared(tmp_path, change(rows()), torch.ones(4) * factor, samples)
    assert result.problems == problems


def test_rounding_may_grow_as_in_an_undisturbed_run(tmp_path: Path) -> None:
    """Differences of many steps are allowed where another order of sums makes them too."""
    final = checkpoint(tmp_path / "final", torch.ones(4) * 1.02)
    whole = checkpoint(tmp_path / "whole", torch.ones(4))
    found = [row | {"denoising": row["denoising"] * 1.02} for row in rows()]
    drill = Drill(steps=STEPS, rounding_loss=0.01, rounding_weights=0.01)
    compare(drill, found, rows(), final, whole)
    assert drill.problems == []
    drill = Drill(steps=STEPS, rounding_loss=0.005, rounding_weights=0.005)
    compare(drill, found, rows(), final, whole)
    assert drill.problems == ["losses differ", "weights differ"]
    far = [row | {"denoising": row["denoising"] * 1.2} for row in rows()]
    drill = Drill(steps=STEPS, rounding_loss=1.0, rounding_weights=1.0)
    compare(drill, far, rows(), final, whole)
    assert drill.problems == ["losses differ"]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--folder '.*' is not empty"):
        main(["--folder", str(tmp_path)])
    with pytest.raises(UserError, match="--folder is missing"):
        main([])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_survives_lost_nodes(tmp_path: Path) -> None:
    """With and without a notice, after which a checkpoint is written within the grace period."""
    counts = drill(DrillOptions(losses=3, nodes=3), tmp_path)
    assert counts["problems"] == []
    assert counts["losses"] == 3
    assert counts["noticed"] == counts["saved_in_time"] == 2
