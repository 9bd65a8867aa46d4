"""Each command ends on the next one, and shows numbers that people read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import jobs.sample
import jobs.train_haste
import pipeline.extract.__main__ as extraction
from pipeline.extract.job import ExtractionSummary
from pipeline.sampling.grid import GridSummary
from pipeline.sampling.job import SampleSummary
from pipeline.store import Store
from pipeline.text import rounded


@pytest.fixture(autouse=True)
def all_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_numbers_have_four_digits() -> None:
    values = {"a": 0.46642331359540246, "b": [1234567.8, 3], "c": None, "d": "0.46642331"}
    expected = {"a": 0.4664, "b": [1235000.0, 3], "c": None, "d": "0.46642331"}
    assert rounded(values) == expected


def test_an_extraction_names_the_check_and_the_training(
    known_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done = ExtractionSummary(0, 0.0, known_store)
    monkeypatch.setattr("pipeline.extract.job.extract", lambda config: done)
    assert extraction.main(["--store", known_store.url]) == 0
    assert f"python -m pipeline.inspect {known_store.url} --check" in caplog.text
    assert f"jobs/train_haste.py --config CONFIG.yaml --store {known_store.url}" in caplog.text


def test_a_training_names_sampling_and_report(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary: dict[str, Any] = {"steps": 20, "steps_per_second": {"phase1": 3.806062081268535}}
    monkeypatch.setattr(jobs.train_haste, "train_run", lambda config: summary)
    assert jobs.train_haste.main(["--output", "my runs", "--name", "a"]) == 0
    assert json.loads(capsys.readouterr().out)["steps_per_second"] == {"phase1": 3.806}
    assert "python jobs/sample.py --checkpoint 'my runs/a' --png samples.png" in caplog.text
    assert "python -m pipeline.report 'my runs/a' --html report.html" in caplog.text


def test_sampling_names_the_evaluation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    png = str(tmp_path / "a.png")
    monkeypatch.setattr("pipeline.sampling.options.check_options", lambda config: None)
    monkeypatch.setattr("pipeline.sampling.grid.draw_grid", lambda config: GridSummary(8, png, 1.0))
    assert jobs.sample.main(["--checkpoint", "x", "--png", png]) == 0
    assert "--num 50000 --npz samples.npz" in caplog.text
    npz = str(tmp_path / "b.npz")
    many = SampleSummary(8, npz, None, 1.0, 8.0, "random", 0)
    monkeypatch.setattr("pipeline.sampling.job.sample_many", lambda config: many)
    assert jobs.sample.main(["--checkpoint", "x", "--num", "8", "--npz", npz]) == 0
    assert f"jobs/evaluate.py --samples {npz} --reference" in caplog.text
    assert "--resolution N" in caplog.text
