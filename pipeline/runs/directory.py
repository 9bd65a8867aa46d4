"""The folder of a run on a local disk or an object store: its file names, reading and sending."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.checkpoints.remote import RemoteCheckpoints
from pipeline.checkpoints.selection import Checkpoints
from pipeline.cli.yaml12 import dump_yaml
from pipeline.runs.evaluations import EVALUATIONS, add_rows
from pipeline.storage.files import (
    absolute_url,
    exists,
    is_local,
    open_url,
    read_bytes,
    redact,
    write_atomic,
)
from pipeline.storage.lease import held_lease
from pipeline.storage.locks import exclusive_lock
from pipeline.storage.redaction import redacted_config
from schemas.errors import NonFiniteError, StoppedError, UserError
from schemas.run import RunConfig

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CONFIG = "config.yaml"
WANDB_ID = "wandb-id.txt"
"""Id of the run at Weights & Biases."""
LEASE = "lock.json"
"""Lock of the command that trains a run on an object store."""
SAMPLES = "samples"
"""Folder of sample grids."""


class RunFolder:
    """Local folder of a run. If the output is an object store, it is a temporary copy, and
    ``publish`` uploads its changes."""

    def __init__(self, config: RunConfig, *, owner: bool = True) -> None:
        """``owner``: the one worker that uploads files."""
        self._filesystem, root = open_url(absolute_url(config.output), what="--output")
        self._root = f"{root}/{config.name}"
        self._local = is_local(self._filesystem)
        self._owner = owner
        self._sent: dict[Path, tuple[int, int]] = {}
        """Size and modification time of every file as it was last uploaded."""
        self._config: bytes | None = None
        """``CONFIG`` as it was uploaded."""
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
            for name in (METRICS, EVALUATIONS, WANDB_ID):  # files that are appended to
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
            if self._owner and isinstance(error, StoppedError | NonFiniteError | None):
                self.publish()
            shutil.rmtree(self.path, ignore_errors=True)

    def lock(self) -> AbstractContextManager[None]:
        """Exclude other commands that train this run. The lock of a dead command is free at once on
        a local disk, and after ``TAKEOVER_SECONDS`` on an object store. Raises ``UserError``."""
        remedy = "choose another --name"
        if self._local:
            return exclusive_lock(self.path, what=f"run '{self.path}'", remedy=remedy)
        where = redact(str(self._filesystem.unstrip_protocol(self._root)))
        path = f"{self._root}/{LEASE}"
        return held_lease(self._filesystem, path, what=f"run '{where}'", remedy=remedy)

    def publish(self) -> None:
        """Upload the small files that are new or changed; nothing to do for a local output. Raises
        ``UserError`` if another command has begun the run with other options since."""
        if self._local:
            return
        if self._config is not None:
            self._check_config()
        for file in self.path.rglob("*"):
            if file.is_file():
                stamp = _stamp(file)  # before reading: later changes are sent next time
                if self._sent.get(file) != stamp:
                    self._send(file)
                    self._sent[file] = stamp

    def _check_config(self) -> None:
        try:
            stored = read_bytes(self._filesystem, f"{self._root}/{CONFIG}")
        except FileNotFoundError:
            return
        if stored != self._config:
            where = redact(str(self._filesystem.unstrip_protocol(self._root)))
            raise UserError(
                f"another command trains run '{where}' with other options ({CONFIG} has changed): "
                "this one ends; choose another --name"
            )

    def _send(self, file: Path) -> None:
        if file == self.path / EVALUATIONS:  # other commands may have added rows meanwhile
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            add_rows(self._filesystem, self._root, rows)
            return
        data = file.read_bytes()
        write_atomic(self._filesystem, f"{self._root}/{file.relative_to(self.path)}", data)
        if file == self.path / CONFIG:
            self._config = data

    def require_shared(self) -> None:
        """Raises ``UserError`` if this node does not see the folder that the driver made, because
        checkpoints written here would be lost."""
        if self._local and not self.path.is_dir():
            raise UserError(
                f"node {socket.gethostname()} does not see '{self.path}': --output must be a "
                "folder that all nodes share, or a URL such as s3://bucket/runs"
            )

    @property
    def has_summary(self) -> bool:
        """True once a run of this name has finished."""
        return exists(self._filesystem, f"{self._root}/{SUMMARY}")

    def summary(self) -> dict[str, Any]:
        """The summary that the run wrote at its end."""
        summary: dict[str, Any] = json.loads(
            read_bytes(self._filesystem, f"{self._root}/{SUMMARY}")
        )
        return summary


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the resolved config, without credentials, to a local run folder."""
    values = redacted_config(config.model_dump(mode="json"))
    _write(folder / CONFIG, dump_yaml(values))


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write the summary of a finished run to its local folder."""
    _write(folder / SUMMARY, json.dumps(summary, indent=1))


def _write(path: Path, text: str) -> None:
    write_atomic(LocalFileSystem(), str(path), text.encode())


def _stamp(file: Path) -> tuple[int, int]:
    """Size and modification time of a file."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
