"""Checkpoints in a local folder."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoints.integrity import STATE, DamagedCheckpointError, verify
from pipeline.checkpoints.selection import (
    PREFIX,
    checkpoint_name,
    latest_valid,
    steps_of,
    to_prune,
)
from pipeline.storage.files import TEMPORARY

if TYPE_CHECKING:
    from pipeline.checkpoints.state import CheckpointContents


class LocalCheckpoints:
    """Folders ``checkpoint-STEP`` of a run's folder; the latest ``keep`` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, contents: CheckpointContents) -> None:
        """Write to a temporary folder, then rename: a checkpoint is complete or absent."""
        for left in self.folder.glob(f"{TEMPORARY}*"):
            if left.is_dir():  # left by a process that was killed
                shutil.rmtree(left)
        temporary = self._temporary()
        temporary.mkdir(parents=True)
        contents.write(temporary)
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

    def _temporary(self) -> Path:
        return self.folder / f"{TEMPORARY}{uuid.uuid4().hex}"


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
