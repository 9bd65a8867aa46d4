"""The folder of a run: metrics, summary and config, wherever the output lies."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.files import absolute_url, is_local, open_url, read_bytes, write_atomic
from pipeline.train.metrics import METRICS
from schemas.run import RunConfig

SUMMARY = "summary.json"
CONFIG = "config.yaml"


class RunFolder:
    """A local folder to write to; where the output is an object store, a copy of what lies there
    that ``publish`` sends back."""

    def __init__(self, config: RunConfig, *, owner: bool = True) -> None:
        """``owner``: of all workers one sends files back; the others have old copies."""
        self._filesystem, root = open_url(absolute_url(config.output), what="--output")
        self._root = f"{root}/{config.name}"
        self._local = is_local(self._filesystem)
        self._owner = owner
        self.path = Path(self._root)

    def __enter__(self) -> RunFolder:
        if not self._local:
            self.path = Path(tempfile.mkdtemp(prefix="haste-run-"))
            with suppress(FileNotFoundError):
                metrics = read_bytes(self._filesystem, f"{self._root}/{METRICS}")
                (self.path / METRICS).write_bytes(metrics)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._local:
            if error is None and self._owner:
                self.publish()
            shutil.rmtree(self.path, ignore_errors=True)

    def publish(self) -> None:
        """Send the small files to the output; a local folder has them already."""
        if self._local:
            return
        for file in self.path.rglob("*"):
            if file.is_file():
                path = f"{self._root}/{file.relative_to(self.path)}"
                write_atomic(self._filesystem, path, file.read_bytes())

    def summary(self) -> dict[str, Any]:
        """What the run wrote at its end."""
        summary: dict[str, Any] = json.loads(
            read_bytes(self._filesystem, f"{self._root}/{SUMMARY}")
        )
        return summary
