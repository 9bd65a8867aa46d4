"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before ray is imported anywhere: no token in the user's home, no usage report, quick polling.
os.environ["HOME"] = tempfile.mkdtemp(prefix="haste-test-home-")
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"

import pytest
import ray

from pipeline.store import Store
from schemas.options import merge
from schemas.run import RunConfig
from tests.stores import make_random_store, tiny_run

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared test data beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` with real images and models is not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def two_cpus() -> Iterator[None]:
    """A Ray cluster on this machine with exactly two CPUs."""
    ray.init(num_cpus=2, num_gpus=0, object_store_memory=100 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def random_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Random numbers for runs that take a second; see ``run_config``."""
    return make_random_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def run_config(random_store: Store, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes configs of a tiny HASTE run on ``random_store``; keyword arguments override."""

    def make(**overrides: Any) -> RunConfig:
        values = {**tiny_run(), "output": str(tmp_path), "store": random_store.url}
        return RunConfig.model_validate(merge(values, overrides))

    return make
