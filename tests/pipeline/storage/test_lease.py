"""Locks on object stores."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from pipeline.runs.directory import LEASE, RunFolder
from pipeline.storage import lease
from pipeline.storage.files import exists, open_url, write_atomic
from pipeline.storage.lease import held_lease
from schemas.errors import UserError
from schemas.run import RunConfig
from tests.s3 import SeaweedFS

Place = tuple[fsspec.AbstractFileSystem, str]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "TAKEOVER_SECONDS", 1.0)


@pytest.fixture(params=["s3", "memory"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "memory":
        filesystem = fsspec.filesystem("memory")
        yield filesystem, "/leases/lock.json"
        filesystem.store.pop("/leases/lock.json", None)
        return
    server: SeaweedFS = request.getfixturevalue("s3")
    filesystem, root = open_url(server.bucket(), what="--output")
    yield filesystem, f"{root}/run/lock.json"


def hold(place: Place, lost: threading.Event | None = None):  # type: ignore[no-untyped-def]
    filesystem, path = place
    call = (lost or threading.Event()).set
    return held_lease(filesystem, path, what="run 'a'", remedy="choose another --name", lost=call)


def test_the_second_is_refused_with_the_name_of_the_first(place: Place) -> None:
    with hold(place):
        for _ in range(2):
            start = time.monotonic()
            with (
                pytest.raises(UserError, match=r"process \d+ on .*choose another --name"),
                hold(place),
            ):
                pass
            assert time.monotonic() - start < 1.0
    with hold(place):
        pass
    assert not exists(*place)


def test_a_dead_holder_is_succeeded(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    filesystem, path = place
    write_atomic(filesystem, path, json.dumps({"holder": "process 7 on gone", "beat": 3}).encode())
    start = time.monotonic()
    with caplog.at_level(logging.INFO), hold(place):
        assert time.monotonic() - start >= 1.0
    assert "process 7 on gone has died or been silent" in caplog.text
    assert not exists(filesystem, path)


HOLD_AND_DIE = """
import os, fsspec
from pipeline.storage.files import open_url
from pipeline.storage.lease import held_lease
filesystem, path = open_url({url!r}, what="--output")
held = held_lease(filesystem, path, what="a", remedy="b")
held.__enter__()
os.kill(os.getpid(), 9)
"""


def test_the_dead_of_this_machine_need_no_wait(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "TAKEOVER_SECONDS", 1000.0)
    url = f"{s3.bucket()}/lock.json"
    done = subprocess.run([sys.executable, "-c", HOLD_AND_DIE.format(url=url)], check=False)
    assert done.returncode == -9
    filesystem, path = open_url(url, what="--output")
    assert exists(filesystem, path)
    start = time.monotonic()
    with hold((filesystem, path)):
        assert time.monotonic() - start < 5


def test_a_file_of_anything_is_no_obstacle(place: Place) -> None:
    filesystem, path = place
    write_atomic(filesystem, path, b"\xff[")
    with hold(place):
        pass


def test_a_holder_that_was_deposed_is_told_and_leaves_the_other_alone(place: Place) -> None:
    filesystem, path = place
    lost = threading.Event()
    with hold(place, lost):
        write_atomic(filesystem, path, b"another")
        assert lost.wait(5)
    assert filesystem.cat_file(path) == b"another"


def test_one_of_many_gets_it(place: Place) -> None:
    """A slow one may get it after another; never two at the same time."""
    inside = threading.Semaphore(1)
    alone: list[bool] = []

    def attempt(_: int) -> None:
        with hold(place):
            free = inside.acquire(blocking=False)
            alone.append(free)
            time.sleep(1.5)
            if free:
                inside.release()

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(attempt, number) for number in range(6)]
    errors = [future.exception() for future in futures]
    assert alone
    assert all(alone)
    assert len(alone) + sum(isinstance(error, UserError) for error in errors) == 6


def test_of_many_successors_one_takes_over(place: Place) -> None:
    filesystem, path = place
    write_atomic(filesystem, path, b"dead")
    test_one_of_many_gets_it(place)


def test_a_run_on_s3_has_one_driver(s3: SeaweedFS) -> None:
    config = RunConfig(name="one", output=s3.bucket())
    with RunFolder(config).lock():
        with pytest.raises(UserError, match=r"run 's3://.*/one' is being written by process"):
            RunFolder(config).lock().__enter__()
        with RunFolder(config.model_copy(update={"name": "two"})).lock():
            pass
    filesystem, root = open_url(config.output, what="--output")
    assert not exists(filesystem, f"{root}/one/{LEASE}")
