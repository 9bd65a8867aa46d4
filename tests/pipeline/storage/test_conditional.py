"""Files that only the first writer makes, and changes of which none is lost."""

from __future__ import annotations

import errno
import multiprocessing
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import Barrier as ThreadBarrier
from typing import Any

import fsspec
import pytest

from pipeline.storage import conditional
from pipeline.storage.conditional import update_file, write_new
from pipeline.storage.files import StorageError, open_url, read_bytes
from tests.s3 import SeaweedFS

BIG = 1 << 20
COUNT = 20


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, str]:
    """A filesystem and the path of a file that does not exist, in a folder that does not either."""
    if request.param == "s3":
        url = request.getfixturevalue("s3").bucket()
    else:
        url = {"local": str(tmp_path), "memory": f"memory://{uuid.uuid4().hex}"}[request.param]
    filesystem, root = open_url(url, what="--store")
    return filesystem, f"{root}/folder/file.json"


def add_line(line: bytes, data: bytes | None) -> bytes:
    lines = (data or b"").splitlines()
    return b"".join(one + b"\n" for one in sorted({*lines, line}))


def test_the_first_writer_makes_the_file(place: tuple[Any, str]) -> None:
    filesystem, path = place
    assert write_new(filesystem, path, b"first")
    assert not write_new(filesystem, path, b"second")
    assert not write_new(filesystem, path, b"first")
    assert read_bytes(filesystem, path) == b"first"


def test_of_many_writers_one_makes_the_file(place: tuple[Any, str]) -> None:
    filesystem, path = place
    barrier = ThreadBarrier(8)

    def write(number: int) -> bool:
        barrier.wait()
        return write_new(filesystem, path, b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(write, range(8)))
    assert made.count(True) == 1
    assert read_bytes(filesystem, path) == b"%d" % made.index(True)


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_change_between_reading_and_writing_is_not_lost(
    old: bytes | None, place: tuple[Any, str]
) -> None:
    filesystem, path = place
    if old is not None:
        assert write_new(filesystem, path, old + b"\n")
    calls = []

    def change(data: bytes | None) -> bytes:
        calls.append(data)
        if len(calls) == 1:
            update_file(filesystem, path, lambda now: add_line(b"rival", now))
        return add_line(b"mine", data)

    update_file(filesystem, path, change)
    assert len(calls) == 2
    assert set(read_bytes(filesystem, path).split()) == {b"mine", b"rival", old or b"mine"}


def test_a_file_that_is_deleted_in_between_is_made_again(place: tuple[Any, str]) -> None:
    filesystem, path = place
    assert write_new(filesystem, path, b"old\n")
    calls = []

    def change(data: bytes | None) -> bytes:
        calls.append(data)
        if len(calls) == 1:
            filesystem.rm_file(path)
        return add_line(b"new", data)

    update_file(filesystem, path, change)
    assert read_bytes(filesystem, path) == b"new\n"


def test_a_change_that_changes_nothing_writes_nothing(
    place: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem, path = place
    assert write_new(filesystem, path, b"a\n")
    monkeypatch.setattr(conditional, "_replace", None)
    update_file(filesystem, path, lambda now: add_line(b"a", now))


def _write_as_process(folder: str, number: int, barrier: Barrier) -> None:
    filesystem, root = open_url(folder, what="--store")
    barrier.wait()
    made = write_new(filesystem, f"{root}/first", b"%d" % number * BIG)
    assert len(read_bytes(filesystem, f"{root}/first")) == BIG
    if made:
        Path(folder, f"made-{number}").touch()
    for line in range(COUNT):
        key = b"%d-%02d" % (number, line)
        update_file(filesystem, f"{root}/lines", lambda now, key=key: add_line(key, now))


def test_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    processes = [
        context.Process(target=_write_as_process, args=(str(tmp_path), number, barrier))
        for number in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (made,) = tmp_path.glob("made-*")
    assert (tmp_path / "first").read_bytes() == made.name[-1:].encode() * BIG
    lines = (tmp_path / "lines").read_text().split()
    assert lines == [f"{number}-{line:02d}" for number in range(3) for line in range(COUNT)]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_local_file_appears_with_all_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem, root = open_url(str(tmp_path), what="--store")
    link, seen = os.link, []

    def noted(source: Path, target: Path) -> None:
        seen.append((Path(source).read_bytes(), Path(target).exists()))
        link(source, target)

    monkeypatch.setattr(os, "link", noted)
    assert write_new(filesystem, f"{root}/a", b"contents")
    assert seen == [(b"contents", False)]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    filesystem, root = open_url(str(tmp_path), what="--store")
    assert write_new(filesystem, f"{root}/a", b"first")
    assert not write_new(filesystem, f"{root}/a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    filesystem, root = open_url(str(tmp_path), what="--store")
    with pytest.raises(StorageError, match=r"cannot write '.*/file/a'"):
        write_new(filesystem, f"{root}/file/a", b"")


@pytest.mark.parametrize("refusal", [NotImplementedError("mode"), TypeError("mode")])
def test_a_backend_that_cannot_create_exclusively(
    refusal: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.get_filesystem_class("memory")
    pipe_file = memory.pipe_file

    def plain(self: Any, path: str, value: bytes, **options: Any) -> None:
        if options:
            raise refusal
        pipe_file(self, path, value)

    monkeypatch.setattr(memory, "pipe_file", plain)
    filesystem, root = open_url(f"memory://{uuid.uuid4().hex}", what="--store")
    assert write_new(filesystem, f"{root}/a", b"first")
    assert not write_new(filesystem, f"{root}/a", b"second")
    assert read_bytes(filesystem, f"{root}/a") == b"first"


def test_endless_conflicts_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional, "MAX_PAUSE", 0.0)
    filesystem, root = open_url(str(tmp_path), what="--store")

    def change(data: bytes | None) -> bytes:
        (tmp_path / "a").write_bytes(uuid.uuid4().bytes)
        return b"mine"

    with pytest.raises(StorageError, match="other commands have changed it 100 times"):
        update_file(filesystem, f"{root}/a", change)


def test_other_refusals_of_s3_stay_errors(s3: SeaweedFS) -> None:
    filesystem, _ = open_url("s3://no-such-bucket/x", what="--store")
    with pytest.raises(StorageError, match="bucket does not exist; create the bucket"):
        write_new(filesystem, "no-such-bucket/x/a", b"")
