"""The folder of a run: metrics, summary and config, wherever the output lies."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.checkpoints.remote import RemoteCheckpoints
from pipeline.checkpoints.selection import Checkpoints
from pipeline.runs.evaluations import EVALUATIONS, add_rows
from pipeline.runs.metrics import CONFIG, METRICS, SUMMARY
from pipeline.storage.files import (
    absolute_url,
    exists,
    is_local,
    open_url,
    read_bytes,
    redact,
    write_atomic,
)
from schemas.errors import StoppedError, UserError
from schemas.run import RunConfig

__all__ = ["CONFIG", "METRICS", "SUMMARY", "RunFolder"]


class RunFolder:
    """A local folder to write to; where the output is an object store, a copy of what lies there
    that ``publish`` sends back."""

    def __init__(self, config: RunConfig, *, owner: bool = True) -> None:
        """``owner``: of all workers one sends files back; the others have old copies."""
        self._filesystem, root = open_url(absolute_url(config.output), what="--output")
        self._root = f"{root}/{config.name}"
        self._local = is_local(self._filesystem)
        self._owner = owner
        self._sent: dict[Path, tuple[int, int]] = {}
        """Of every file that lies there as it lies here: bytes and time of its last change."""
        self.path = Path(self._root)
        self.checkpoints: Checkpoints
        if self._local:
            self.checkpoints = LocalCheckpoints(self.path, config.checkpoint.keep)
        else:
            url = f"{redact(config.output.rstrip('/'))}/{config.name}"
            self.checkpoints = RemoteCheckpoints(
                self._filesystem, self._root, url, config.checkpoint.keep
            )

    def __enter__(self) -> RunFolder:
        if not self._local:
            self.path = Path(tempfile.mkdtemp(prefix="haste-run-"))
            for name in (METRICS, EVALUATIONS):  # they are added to
                with suppress(FileNotFoundError):
                    rows = read_bytes(self._filesystem, f"{self._root}/{name}")
                    (self.path / name).write_bytes(rows)
                    self._sent[self.path / name] = _stamp(self.path / name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._local:
            if self._owner and (error is None or isinstance(error, StoppedError)):
                self.publish()
            shutil.rmtree(self.path, ignore_errors=True)

    def publish(self) -> None:
        """Send the small files that are new or have changed to the output; a local folder has
        them already."""
        if self._local:
            return
        for file in self.path.rglob("*"):
            if file.is_file():
                stamp = _stamp(file)  # before it is read: what is added meanwhile is sent next time
                if self._sent.get(file) != stamp:
                    self._send(file)
                    self._sent[file] = stamp

    def _send(self, file: Path) -> None:
        if file == self.path / EVALUATIONS:  # others may have recorded theirs meanwhile
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            add_rows(self._filesystem, self._root, rows)
            return
        path = f"{self._root}/{file.relative_to(self.path)}"
        write_atomic(self._filesystem, path, file.read_bytes())

    def require_shared(self) -> None:
        """Raises ``UserError`` where this machine does not see the folder that the driver made:
        checkpoints written here would be lost to the others."""
        if self._local and not self.path.is_dir():
            raise UserError(
                f"node {socket.gethostname()} does not see '{self.path}': --output must be a "
                "folder that all nodes share, or a URL such as s3://bucket/runs"
            )

    @property
    def has_summary(self) -> bool:
        """Whether the run came to an end once."""
        return exists(self._filesystem, f"{self._root}/{SUMMARY}")

    def summary(self) -> dict[str, Any]:
        """What the run wrote at its end."""
        summary: dict[str, Any] = json.loads(
            read_bytes(self._filesystem, f"{self._root}/{SUMMARY}")
        )
        return summary


def _stamp(file: Path) -> tuple[int, int]:
    """What is another once a file has been written to."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
