"""Who may write to a folder of images, and when."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage.locks import LOCK, exclusive_lock
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
