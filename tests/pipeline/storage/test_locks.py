"""Who may write to a folder of images, and when."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage.locks import LOCK, exclusive_lock, wait_lock
from schemas.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from pipeline.storage.locks import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), what="it", remedy="go"):
    print("held", flush=True)
    time.sleep(600)
"""
TAKEN = {"what": "--npz 'a.npz'", "remedy": "name another --npz"}


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "parts")],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_ends_with_its_process(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    said = f"--npz 'a.npz' is being written by process {holder.pid} on {socket.gethostname()}: wait"
    with pytest.raises(UserError, match=said), exclusive_lock(folder, **TAKEN):
        pass
    holder.kill()
    holder.wait()
    assert (folder / LOCK).exists()
    with exclusive_lock(folder, **TAKEN):
        assert (folder / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert list(folder.iterdir()) == []


def test_no_folder_is_left_that_was_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    with (
        exclusive_lock(folder, **TAKEN),
        pytest.raises(UserError, match="is being written by process"),
        exclusive_lock(folder, **TAKEN),
    ):
        pass
    assert not folder.exists()
    with exclusive_lock(folder, **TAKEN):
        (folder / "an image").touch()
    assert [path.name for path in folder.iterdir()] == ["an image"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            UserError, match=r"--npz 'a.npz' cannot be written \(Not a directory\): name"
        ),
        exclusive_lock(tmp_path / "file" / "parts", **TAKEN),
    ):
        pass


def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive_lock(tmp_path / "parts", **TAKEN):
        assert (tmp_path / "parts" / LOCK).exists()
    assert not (tmp_path / "parts").exists()
    with wait_lock(tmp_path):
        pass


@pytest.mark.parametrize("name", [".", "a lock file"])
def test_a_waiting_process_gets_its_turn(tmp_path: Path, name: str) -> None:
    order: list[str] = []

    def wait() -> None:
        with wait_lock(tmp_path / name):
            order.append("second")

    with wait_lock(tmp_path / name):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    with wait_lock(tmp_path / "missing" / "lock"):
        pass
