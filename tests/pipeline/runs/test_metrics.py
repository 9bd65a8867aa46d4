"""Lines of the log between rows of the metrics."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipeline.runs import metrics
from pipeline.runs.metrics import MetricsLog
from schemas.run import RunConfig


def test_a_line_a_minute_between_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps of 4 s from a checkpoint at step 100: a line after 60 s, and 60 s after a row."""
    caplog.set_level(logging.INFO)
    clock = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    log = MetricsLog(tmp_path, RunConfig(steps=400, global_batch=64), start_step=100, rows=0)
    said = {}
    for step in range(101, 140):
        clock[0] += 4.0
        caplog.clear()
        if step == 120:
            row = {"step": step, "phase": 1, "denoising": 0.5, "data_wait_share": 0.01}
            log.row(row | {"steps_per_second": 0.25, "images_per_second": 16.0})
        else:
            log.note_step(step)
        if caplog.messages:
            (said[step],) = caplog.messages
    log.close()
    rates = "0.25 steps/s  16 images/s  ETA "
    assert said == {
        115: f"step 115/400  {rates}0:19:00",
        120: f"step 120/400  phase 1  denoising 0.5000  data wait 1%  {rates}0:18:40",
        135: f"step 135/400  {rates}0:17:40",
    }
