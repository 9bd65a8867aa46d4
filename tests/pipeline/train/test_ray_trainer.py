"""Errors of Ray's worker groups as this project reports them."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pipeline.train.ray_trainer import describe_death


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (ActorDiedError(), "The actor died unexpectedly before finishing this task."),
        (
            OutOfMemoryError("Memory on the node was\n15.2GB / 16GB"),
            "Memory on the node was 15.2GB / 16GB",
        ),
    ],
)
def test_a_dead_worker_is_named(cause: Exception, reason: str) -> None:
    """Also where others have failed before it, because they lost their connection."""
    failures: dict[int, Exception] = {
        0: RuntimeError("Connection closed by peer"),
        3: WorkerHealthCheckFailedError("A worker health check failed.", failure=cause),
    }
    text = describe_death(WorkerGroupError("snippets", failures), 2)
    assert text is not None
    assert text.startswith("worker 3 died, and --workers.max-failures 2 allows no more restarts")
    assert text.endswith(f"Ray's reason: {reason}")
    assert "\n" not in text


def test_errors_of_the_training_stay_as_they_are() -> None:
    unpicklable = WorkerHealthCheckFailedError("no pickle", failure=TypeError("cannot pickle"))
    failures: dict[int, Exception] = {0: ValueError("shape"), 1: unpicklable}
    assert describe_death(WorkerGroupError("snippets", failures), 3) is None
