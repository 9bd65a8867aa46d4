"""Speed metrics of a run: FLOPs, bytes, traces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.distributed.process_group import ProcessGroup
from pipeline.models.flops import STEP, peak_tflops, student_flops
from pipeline.runs.metrics import read_metrics
from pipeline.train.step_meter import Throughput
from schemas.run import RunConfig
from schemas.student import StudentConfig
from tests.pipeline.train.test_loop import losses, run
from tests.processes import train_on

Make = Callable[..., RunConfig]


def test_rates_of_a_run(run_config: Make, tmp_path: Path) -> None:
    config = run_config()
    run(config, tmp_path / "run")
    rows = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "event" not in r]
    flops = STEP * student_flops(config.student)
    for row in rows:
        assert row["tflops_per_worker"] == pytest.approx(row["images_per_second"] * flops / 1e12)
        assert "mfu" not in row
    assert sum(row["bytes_per_second_maps"] for row in rows[:3]) > 0
    assert [row["bytes_per_second_maps"] for row in rows[3:]] == [0, 0, 0]


def test_a_gpu_s_share_of_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    student = StudentConfig(model="SiT-XL/2")
    rates = Throughput(student, ProcessGroup(0, 2, torch.device("cuda"))).rates(1100.0)
    # three times the 237 GFLOP of the forward pass, at 550 images/s per worker
    assert rates["tflops_per_worker"] == pytest.approx(392, rel=0.01)
    assert rates["mfu"] == pytest.approx(0.396, abs=0.005)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Something else", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


@pytest.mark.parametrize("first", [2, 6])  # 6 is the last step
def test_a_trace_on_request(run_config: Make, tmp_path: Path, first: int) -> None:
    folder = tmp_path / "run"
    train_on(2, run_config(profile=first), folder)
    assert [path.name for path in folder.glob("trace-*")] == [f"trace-{first}.json"]
    names = {
        event.get("name", "")
        for event in json.loads((folder / f"trace-{first}.json").read_text())["traceEvents"]
    }
    assert any("AdamW" in name for name in names)
    run(run_config(), tmp_path / "plain")
    for row, expected in zip(losses(folder), losses(tmp_path / "plain"), strict=True):
        assert row == pytest.approx(expected, rel=2e-4)
