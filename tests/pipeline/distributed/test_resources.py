"""Number and size of workers on clusters of several sizes."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from pipeline.distributed.resources import OptionNames, choose_resources
from schemas.errors import UserError

OPTIONS = OptionNames("--count", "--cpus", "--gpus")


@pytest.mark.parametrize(
    ("cluster", "requested", "expected"),
    [
        ({"CPU": 6}, (None, None, None), (6, 1, 0.0, "cpu")),
        ({"CPU": 6}, (None, 4, None), (1, 4, 0.0, "cpu")),
        ({"CPU": 6}, (2, 2.5, None), (2, 2.5, 0.0, "cpu")),
        ({"CPU": 6, "GPU": 2}, (None, None, None), (2, 3, 1.0, "cuda")),
        ({"CPU": 64, "GPU": 2}, (None, None, 0.5), (4, 8, 0.5, "cuda")),
        ({"CPU": 64, "GPU": 2}, (1, 2, None), (1, 2, 1.0, "cuda")),
        ({"CPU": 6, "GPU": 2}, (None, None, 0), (6, 1, 0, "cpu")),
    ],
)
def test_defaults_fit_the_cluster(
    cluster: dict[str, int],
    requested: tuple[Any, Any, Any],
    expected: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: cluster)
    found = choose_resources(*requested, options=OPTIONS)
    assert (found.count, found.cpus, found.gpus, found.device) == expected
    assert found.threads == max(1, int(found.cpus))


def test_workers_without_gpus_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 6})
    limit: dict[str, Any] = {"options": OPTIONS, "max_cpu_workers": 4}
    assert choose_resources(None, 1, None, **limit).count == 4
    assert choose_resources(5, 1, None, **limit).count == 5


@pytest.mark.parametrize(
    ("requested", "complaint"),
    [
        ((3, 1, None), r"--count asks for 3 x 1 CPU; the Ray cluster has 2 CPUs"),
        ((None, 3, None), r"--cpus asks for 1 x 3 CPUs"),
        ((None, 1, 1), r"--gpus asks for 1 x 1 GPU; the Ray cluster has 0 GPUs"),
        ((2, 1, 1), r"--count asks for 2 x 1 GPU"),
    ],
)
def test_workers_that_never_fit_are_refused(
    requested: tuple[Any, Any, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2})
    with pytest.raises(UserError, match=complaint):
        choose_resources(*requested, options=OPTIONS)
