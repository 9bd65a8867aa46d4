"""Log records of Ray actors, on the stderr of the driver."""

from __future__ import annotations

import logging
import re

import pytest
import ray

from pipeline.cli.log_setup import set_up_logging
from pipeline.distributed.log_relay import set_up_worker_logging
from pipeline.distributed.ray_cluster import ray_cluster

pytestmark = pytest.mark.usefixtures("two_cpus")


@ray.remote(num_cpus=0)
class Worker:
    def __init__(self) -> None:
        set_up_worker_logging()

    def log(self, number: int) -> None:
        logger = logging.getLogger("pipeline.storage")
        logger.debug("details of %d", number)
        logger.warning("number %d", number)


def test_records_of_actors_are_lines_of_the_driver(capfd: pytest.CaptureFixture[str]) -> None:
    for level, expected in (("info", 1), ("debug", 2), ("error", 0)):
        set_up_logging(level)
        try:
            with ray_cluster(None):
                workers = [Worker.remote() for _ in range(2)]
                for number, worker in enumerate(workers):
                    ray.get(worker.log.remote(number))
                    ray.get(worker.__ray_ready__.remote())
        finally:
            set_up_logging("info")
        lines = capfd.readouterr().err.splitlines()
        for number in range(2):
            found = [line for line in lines if line.endswith(f" {number}")]
            assert len(found) == expected
            if expected:
                assert re.fullmatch(rf"\d\d:\d\d:\d\d WARNING number {number}", found[-1])


def test_a_driver_has_no_relay_of_its_own() -> None:
    handlers = list(logging.getLogger("pipeline").handlers)
    set_up_worker_logging()
    assert logging.getLogger("pipeline").handlers == handlers
