"""Checkpoints in a local folder."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fsspec.implementations.local import LocalFileSystem

from pipeline.checkpoints.integrity import STATE, DamagedCheckpointError, verify
from pipeline.checkpoints.selection import (
    PREFIX,
    checkpoint_name,
    latest_valid,
    steps_of,
    to_prune,
)
from pipeline.checkpoints.shares import POLL_SECONDS, Files, announce, collect
from pipeline.storage.files import TEMPORARY, StorageError

if TYPE_CHECKING:
    from pipeline.checkpoints.state import CheckpointContents

FOLDER_SECONDS = 300.0
"""Seconds that a worker waits for the main rank to make the folder of a checkpoint; it may be
waiting for the device."""


class LocalCheckpoints:
    """Folders ``checkpoint-STEP`` of a run's folder; the latest ``keep`` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, contents: CheckpointContents) -> None:
        """Write to a temporary folder, then rename: a checkpoint is complete or absent. Each worker
        that has a share calls this: the main rank makes the folder, in which the others write, and
        renames it when all have."""
        share = contents.share
        temporary = self._temporary(None if share is None else share.token)
        if share is not None and share.number:
            self._await(temporary)
            announce(
                LocalFileSystem(), str(temporary), share, lambda: contents.write_share(temporary)
            )
            return
        for left in self.folder.glob(f"{TEMPORARY}*"):
            if left.is_dir():  # left by a process that was killed, or that may be ending just now
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        if share is None:
            contents.write(temporary)
        else:
            own = contents.write_share(temporary)
            others = collect(LocalFileSystem(), str(temporary), share, self.where(step))
            self._check_sizes(temporary, others)
            contents.write_shared_state(temporary, own | others)
        final = self.folder / checkpoint_name(step)
        if final.exists():  # a damaged one that the run has now replaced
            os.replace(final, self._temporary())
        os.replace(temporary, final)
        _sync(self.folder)
        for old in to_prune(self.steps(), step, self.keep):
            shutil.rmtree(self.folder / checkpoint_name(old))

    def steps(self) -> list[int]:
        return steps_of(path.name for path in self.folder.glob(f"{PREFIX}*") if path.is_dir())

    def where(self, step: int) -> str:
        return str(self.folder / checkpoint_name(step))

    def state(self, step: int) -> bytes:
        try:
            return (self.folder / checkpoint_name(step) / STATE).read_bytes()
        except OSError as error:
            raise DamagedCheckpointError(self.where(step), f"{STATE}: {error.strerror}") from None

    def fetch(self, step: int, scratch: Path) -> Path:
        return self.folder / checkpoint_name(step)

    def _temporary(self, token: str | None = None) -> Path:
        return self.folder / f"{TEMPORARY}{token or uuid.uuid4().hex}"

    def _await(self, temporary: Path) -> None:
        """Wait for the main rank to make the folder. This worker makes none: one that outlives its
        run leaves nothing behind."""
        end = time.monotonic() + FOLDER_SECONDS
        # a listing, because network file systems remember for long that a name did not exist
        while temporary.name not in self._listed():
            if time.monotonic() > end:
                raise StorageError(
                    f"'{temporary}', which the first worker makes, is not seen by this one: "
                    "--output must be a folder that all nodes share, or a URL"
                )
            time.sleep(POLL_SECONDS)

    def _listed(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:  # such as a stale handle of a network file system
            raise StorageError(f"'{self.folder}': {error.strerror}") from None

    def _check_sizes(self, temporary: Path, files: Files) -> None:
        """Raises ``StorageError`` where a file that another worker wrote is not here as it was."""
        for name, about in files.items():
            try:
                # opened, because network file systems ask for the present size then
                with (temporary / name).open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
            except OSError as error:
                raise StorageError(f"'{temporary / name}': {error.strerror}") from None
            if size != about["bytes"]:
                raise StorageError(
                    f"'{temporary / name}' has {size} of {about['bytes']} bytes that were written"
                )


def latest_checkpoint(folder: Path, check: Callable[[Path], object] = verify) -> Path | None:
    """The latest valid checkpoint of a run's folder, or ``folder`` itself if it is a checkpoint.

    Its checksums are verified here, or what else ``check`` examines. None where there is none;
    raises ``UserError`` where none is valid.
    """
    if (folder / STATE).exists() or (folder.is_dir() and steps_of([folder.name])):
        check(folder)
        return folder
    found = latest_valid(LocalCheckpoints(folder, keep=1), folder, check)
    return found[1] if found else None


def _sync(folder: Path) -> None:
    """Flush a folder's entries to disk, because a rename alone may be lost in a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
