"""Checkpoints of a run that trains in one plain process."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from pipeline.files import TEMPORARY
from pipeline.train.checkpoint import STATE

PREFIX = "checkpoint-"


class LocalCheckpoints:
    """Folders ``checkpoint-STEP`` below a run's folder; the newest ``keep`` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write beside, then rename: a checkpoint is whole or not there."""
        temporary = self.folder / f"{TEMPORARY}{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        write(temporary)
        final = self.folder / f"{PREFIX}{step:09d}"
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        for old in self.list()[: -self.keep]:
            shutil.rmtree(old)

    def list(self) -> list[Path]:
        """Oldest first."""
        return sorted(p for p in self.folder.glob(f"{PREFIX}*") if (p / STATE).exists())


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder, whoever wrote it; ``folder`` itself if it is one."""
    if (folder / STATE).exists():
        return folder
    found = LocalCheckpoints(folder, keep=1).list()
    return found[-1] if found else None
