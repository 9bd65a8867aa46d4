"""Tables of an experiment: their statistics, and that the page holds what its files say."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.experiments import results as module
from jobs.experiments.page import END, PAGE, RESULTS, begin, main, names, page_with_tables
from jobs.experiments.results import (
    bootstrap,
    cosine_table,
    difference,
    first_crossing,
    read_run_numbers,
    steps_to_equal,
    tables,
    termination_table,
)
from schemas.errors import UserError


def run(arm: str, seed: int, **curves: Any) -> dict[str, Any]:
    empty = {key: {} for key in (*module.VALUES, "cosine")}
    return {"arm": arm, "seed": seed, "failed": None, "termination_step": None, **empty, **curves}


def made(*runs: dict[str, Any], steps: int = 300) -> dict[str, Any]:
    return {"facts": {}, "steps": steps, "pairs": {}, "runs": list(runs)}


CURVES = {
    ("vanilla", 0): [10, 8, 6],
    ("vanilla", 1): [12, 9, 7],
    ("vanilla", 2): [11, 9, 8],
    ("repa", 0): [8, 5, 4],
    ("repa", 1): [9, 7, 7.5],
    ("repa", 2): [12, 10, 7],
}
THREE = made(
    *(
        run(arm, seed, frechet={str(100 * n): v for n, v in enumerate(values, 1)})
        for (arm, seed), values in CURVES.items()
    )
)


def test_differences_are_paired_by_seed() -> None:
    found = difference(THREE, "vanilla", "repa", "frechet")
    assert found is not None
    mean, interval = found
    assert mean == pytest.approx((-2 + 0.5 - 1) / 3)
    means = sorted(np.mean(some) for some in itertools.product((-2, 0.5, -1), repeat=3))
    assert interval is not None
    # of the 27 equally likely means: 2.5% are below the second one, 97.5% below the last but one
    assert means[0] <= interval[0] <= means[1]
    assert means[-2] <= interval[1] <= means[-1]
    assert difference(THREE, "vanilla", "repa", "frechet") == found  # seeded
    alone = made(*(r for r in THREE["runs"] if r["seed"] == 0 or r["arm"] == "vanilla"))
    assert difference(alone, "vanilla", "repa", "frechet") == (-2, None)
    assert difference(THREE, "vanilla", "haste", "frechet") is None


def test_bootstrap_covers_the_mean_of_many_seeds() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(40):
        values = dict(enumerate(rng.standard_normal(20)))
        interval = bootstrap(list(values), lambda some: float(np.mean([values[s] for s in some])))  # noqa: B023
        assert interval is not None
        hits += interval[0] <= 0 <= interval[1]
    assert 33 <= hits <= 40
    assert bootstrap([3], lambda some: 1.0) is None


@pytest.mark.parametrize(
    ("values", "wanted", "step"),
    [
        ([5, 4, 3], 3.5, 250),
        ([5, 4, 3], 3, 300),
        ([5, 4, 3], 6, 100),
        ([5, 4, 3], 2.9, math.inf),
        ([5, 2, 4], 3, 100 + 100 * 2 / 3),
    ],
)
def test_first_crossing(values: list[float], wanted: float, step: float) -> None:
    assert first_crossing([100, 200, 300], values, wanted) == pytest.approx(step)


def test_steps_to_equal_quality_are_those_of_mean_curves() -> None:
    found = steps_to_equal(THREE, "vanilla", "repa", "frechet")
    assert found is not None
    wanted, means = 7, [29 / 3, 22 / 3, 18.5 / 3]
    expected = 200 + 100 * (means[1] - wanted) / (means[1] - means[2])
    assert found[0] == pytest.approx(expected)
    worse = made(*THREE["runs"][:3], *(run("slow", s, frechet={"300": 99.0}) for s in range(3)))
    assert steps_to_equal(worse, "vanilla", "slow", "frechet") == (math.inf, (math.inf, math.inf))
    assert "not reached [not reached, not reached]" in tables(worse)


def test_cosines_are_means_over_seeds_and_times_of_one_step() -> None:
    first = {"2": {"0.1": 0.4, "0.9": -0.2}, "4": {"0.1": -0.3, "0.9": 0.1}}
    second = {"2": {"0.1": 0.6, "0.9": None}, "4": {"0.1": -0.1, "0.9": 0.1}}
    found = made(run("vanilla", 0), run("repa", 0, cosine=first), run("repa", 1, cosine=second))
    head, rows = cosine_table(found)
    means = np.mean([0.4, -0.2, 0.6]), np.mean([-0.3, 0.1, -0.1, 0.1])
    assert rows == [["repa", f"−{-means[1]:.3f}", f"{means[0]:.3f}", "3 of 7"]]  # noqa: RUF001
    assert len(head) == len(rows[0])
    assert f"| {' | '.join(rows[0])} |" in tables(found)
    assert cosine_table(THREE)[1] == []
    assert "cosine" not in tables(THREE)


def test_the_termination_is_compared_with_the_run_that_goes_on() -> None:
    found = THREE | {"pairs": {"repa": "vanilla"}}
    [row] = termination_table(found)[1]
    assert row[0] == "repa − vanilla"  # noqa: RUF001
    assert row[1].startswith("−0.83 [−2.00, +0.50]")  # noqa: RUF001
    assert f"| {' | '.join(row)} |" in tables(found)


def test_failed_and_missing_runs_are_shown() -> None:
    broken = run("haste", 1) | {"failed": "its process ended with code -9"}
    text = tables(made(*THREE["runs"], run("haste", 0, frechet={"300": 5.0}), broken))
    assert "| haste | 1 of 2, 1 failed | 5.00 |" in text
    assert "Failed: haste, seed 1: its process ended with code -9" in text
    assert "| vanilla | 3 of 3 | 7.00 ± 1.00 |" in text


def test_numbers_of_a_run_are_read_from_its_files(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "phase": 1, "denoising": 1.0},
        {"step": 1, "event": "validation loss", "validation_ema": 0.123456789},
        {
            "step": 2,
            "event": "trigger observation",
            "gradient_cosine": 0.1,
            "gradient_cosine_t0.5": 0.2,
        },
        {"step": 3, "event": "alignment terminated", "trigger": "fixed"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdicts = tmp_path / "judged.json"
    row = {"frechet": 5.0, "agreement": 0.5, "precision": 0.25, "recall": math.inf}
    verdicts.write_text(json.dumps({"rows": {"4": row}}))
    found = read_run_numbers(tmp_path, verdicts)
    assert found["validation"] == {"1": 0.123457}
    assert found["cosine"] == {"2": {"0.5": 0.2}}
    assert found["termination_step"] == 3
    assert (found["frechet"], found["recall"]) == ({"4": 5.0}, {"4": None})


def test_the_page_holds_the_tables_of_every_file_of_results() -> None:
    """And of nothing else: a file without a part, and a part without a file, are errors."""
    text = PAGE.read_text()
    assert page_with_tables(text, RESULTS) == text
    assert sorted(path.stem for path in RESULTS.glob("*.json")) == sorted(names(text))


def test_a_page_is_filled_in(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(THREE))
    text = f"# Page\n{begin('one')}\nold\n{END}\nrest\n"
    filled = page_with_tables(text, tmp_path)
    assert filled == f"# Page\n{begin('one')}\n{tables(THREE)}{END}\nrest\n"
    assert page_with_tables(filled, tmp_path) == filled
    (tmp_path / "two.json").write_text(json.dumps(THREE))
    with pytest.raises(UserError, match="has no part 'two'"):
        page_with_tables(filled, tmp_path)
    with pytest.raises(UserError, match=r"there is no .*three.json"):
        page_with_tables(f"{filled}{begin('three')}\n{END}\n{begin('two')}\n{END}\n", tmp_path)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    before = PAGE.read_bytes()
    with pytest.raises(UserError, match=r"'.*/no' has no results.json"):
        main([str(tmp_path / "no"), "digits"])
    assert PAGE.read_bytes() == before
