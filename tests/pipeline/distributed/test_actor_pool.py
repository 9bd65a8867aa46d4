"""Actors that die while they load, beside others that work."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from pipeline.distributed import actor_pool
from pipeline.distributed.actor_pool import Actors
from schemas.errors import UserError

pytestmark = pytest.mark.usefixtures("two_cpus")


class OneLives:
    """Of all that load in one folder the first takes its time, and the others die at once."""

    def load(self, folder: str) -> str:
        try:
            (Path(folder) / "taken").mkdir()
        except FileExistsError:
            os._exit(1)
        while len(list(Path(folder).iterdir())) < 2:
            time.sleep(0.05)
        return "loaded"

    def double(self, number: int) -> int:
        return 2 * number


class NoneLives(OneLives):
    def load(self, folder: str) -> str:
        os._exit(1)


class DiesAtWork(OneLives):
    """And nobody after it can load."""

    def double(self, number: int) -> int:
        os._exit(1)


class Touch(logging.Handler):
    """Makes a file in a folder when an actor is given up."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        if "is not replaced" in record.getMessage():
            (self.folder / "given up").touch()


@contextmanager
def actors(kind: type[OneLives], folder: Path) -> Iterator[Actors[str]]:
    handler = Touch(folder)
    actor_pool.logger.addHandler(handler)
    made: Actors[str] = Actors(
        kind,
        lambda actor: actor.load.remote(str(folder)),
        count=2,
        cpus=1,
        gpus=0,
        max_attempts=2,
        kind="testing",
        check_same=lambda one, other: None,
    )
    try:
        yield made
    finally:
        made.close()
        actor_pool.logger.removeHandler(handler)


def double(made: Actors[str], numbers: range) -> list[int]:
    return sorted(made.work(numbers, lambda actor, n: actor.double.remote(n), name=str))


def test_who_cannot_load_is_given_up_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where those deaths come before the first of the others has loaded."""
    with actors(OneLives, tmp_path) as made:
        assert made.describe() == "loaded"
        assert double(made, range(5)) == [0, 2, 4, 6, 8]
    again, given_up = caplog.messages
    assert again.startswith("an actor for testing died while loading, another is started: Actor")
    assert "2 times in a row, and is not replaced; the others continue: Actor" in given_up


def test_where_nobody_can_load_that_is_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        actors(NoneLives, tmp_path) as made,
        pytest.raises(UserError, match=r"^testing actors die while loading: Actor"),
    ):
        made.describe()
    assert len([line for line in caplog.messages if "another is started" in line]) in (1, 2)


def test_the_end_of_the_last_that_could_is_the_end_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with actors(DiesAtWork, tmp_path) as made:
        made.describe()
        with pytest.raises(UserError, match=r"^testing actors die while loading: Actor"):
            double(made, range(5))
    assert any("0 goes back to the queue" in line for line in caplog.messages)


class Looks:
    def look(self) -> tuple[bool, int, str]:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text()
        return "timm" in sys.modules, os.nice(0), parent.replace("\0", " ")


def test_workers_of_tests_are_forks() -> None:
    """Otherwise each imports for seconds, and waits for the computing tests of other processes."""
    imported, priority, parent = ray.get(ray.remote(num_cpus=0)(Looks).remote().look.remote())
    assert "tests/forks.py --serve" in parent
    assert imported
    assert priority == os.nice(0)
