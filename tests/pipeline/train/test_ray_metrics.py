"""Metrics that Ray exports, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from jobs.train_haste import train_run
from pipeline.runs.metrics import OBSERVERS, read_metrics
from pipeline.train.local import train_here
from pipeline.train.ray_metrics import GAUGES, exported_metrics, measurements
from schemas.run import RunConfig

DASHBOARD = Path(__file__).parents[3] / "docker" / "grafana" / "haste.json"


class FakeGauge:
    """Values by (name, tags)."""

    values: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, tag_keys
        assert description.endswith(".")

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        FakeGauge.values[self.name, tuple(sorted(tags.items()))] = value


def test_a_run_exports_its_last_row(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    FakeGauge.values = {}
    config = run_config(log_every=1)
    with exported_metrics("tiny", FakeGauge):
        train_here(config, tmp_path / "run")
    assert OBSERVERS == []
    rows = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "event" not in r]
    aligned, last = rows[0], rows[-1]
    assert (aligned["phase"], last["phase"]) == (1, 2)
    run = ("run", "tiny")
    expected = {
        ("haste_step", (run,)): last["step"],
        ("haste_phase", (run,)): 2,
        ("haste_images_per_second", (run,)): last["images_per_second"],
        ("haste_data_wait_share", (run,)): last["data_wait_share"],
        ("haste_grad_norm", (run,)): last["grad_norm"],
        ("haste_loss", (("loss", "denoising"), run)): last["denoising"],
        ("haste_loss", (("loss", "feature"), run)): 0.0,
        ("haste_loss", (("loss", "attention"), run)): 0.0,
        ("haste_read_bytes_per_second", (run, ("stream", "latents"))): last[
            "bytes_per_second_latents"
        ],
        ("haste_read_bytes_per_second", (run, ("stream", "maps"))): 0.0,
    }
    assert FakeGauge.values == expected
    assert {name for name, _ in FakeGauge.values} == set(GAUGES)


def test_an_event_measures_nothing() -> None:
    assert list(measurements({"step": 3, "event": "evaluation", "fid": 2.0})) == []


def queried() -> set[str]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    texts = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    texts += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    return {name for text in texts for name in re.findall(r"ray_\w+", text)}


def test_the_dashboard_queries_exactly_the_metrics() -> None:
    assert queried() == {f"ray_{name}" for name in GAUGES}


def test_legends_are_tags() -> None:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            name = re.match(r"ray_(\w+)", target["expr"])[1]  # type: ignore[index]
            tags = {"run", *GAUGES[name][1]}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= tags


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus")
def test_prometheus_gets_them(run_config: Callable[..., RunConfig]) -> None:
    """Ray's own endpoint has the names that the dashboard queries."""
    train_run(run_config(log_every=1, workers={"cpus_per_worker": 0.5}))
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    found: set[str] = set()
    while not queried() <= found and time.monotonic() < deadline:
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        found = set(re.findall(r"^(ray_haste_\w+)", text, re.MULTILINE))
        time.sleep(1)
    assert found == queried()
