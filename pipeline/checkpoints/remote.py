"""Checkpoints on an object store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec

from pipeline.checkpoints.integrity import (
    STATE,
    DamagedCheckpointError,
    UnfinishedCheckpointError,
    parse_state_json,
    write_state,
)
from pipeline.checkpoints.selection import Write, checkpoint_name, steps_of, to_prune
from pipeline.storage.files import list_tree, publish, read_bytes, remove, retrying


class RemoteCheckpoints:
    """Folders ``checkpoint-STEP`` below ``root``; the newest ``keep`` stay.

    There is no rename: files are uploaded one by one, each of them whole or not there, and
    ``state.json``, without which there is no checkpoint yet, comes last and goes first.
    """

    def __init__(
        self, filesystem: fsspec.AbstractFileSystem, root: str, url: str, keep: int
    ) -> None:
        """``url`` names ``root`` for people."""
        self.filesystem = filesystem
        self.root = root
        self.url = url
        self.keep = keep

    def save(self, step: int, write: Write) -> None:
        with tempfile.TemporaryDirectory(prefix="haste-checkpoint-") as scratch:
            write(Path(scratch))
            self._remove(step)  # what a crash left of it
            files = sorted(Path(scratch).iterdir(), key=lambda path: path.name == STATE)
            for path in files:
                publish(self.filesystem, path, f"{self._folder(step)}/{path.name}")
        finished = steps_of({folder for folder, file in self._files() if file == STATE})
        kept = {step, *finished} - set(to_prune(finished, step, self.keep))
        for other in self.steps():
            if other not in kept:
                self._remove(other)

    def steps(self) -> list[int]:
        return steps_of({folder for folder, _ in self._files()})

    def where(self, step: int) -> str:
        return f"{self.url}/{checkpoint_name(step)}"

    def state(self, step: int) -> bytes:
        return read_state_bytes(self.filesystem, self._folder(step), self.where(step))

    def fetch(self, step: int, scratch: Path) -> Path:
        """Downloads the files that the state lists, if all have their sizes; the state last."""
        target = scratch / checkpoint_name(step)
        if (target / STATE).exists():  # fetched already, for another worker of this machine
            return target
        data = self.state(step)
        folder, where = self._folder(step), self.where(step)
        target.mkdir(parents=True, exist_ok=True)
        for name in files_of_size(self.filesystem, folder, parse_state_json(data, where), where):
            download(self.filesystem, f"{folder}/{name}", target / name)
        (target / STATE).write_bytes(data)
        return target

    def _files(self) -> list[tuple[str, str]]:
        """Folder and rest of the path of every file: an empty folder is but a name."""
        paths = list_tree(self.filesystem, self.root)
        below = (path.removeprefix(f"{self.root}/").partition("/") for path in paths)
        return [(folder, file) for folder, _, file in below]

    def _folder(self, step: int) -> str:
        return f"{self.root}/{checkpoint_name(step)}"

    def _remove(self, step: int) -> None:
        files = list_tree(self.filesystem, self._folder(step))
        for path in sorted(files, key=lambda path: not path.endswith(f"/{STATE}")):
            remove(self.filesystem, path)


def read_state_bytes(filesystem: fsspec.AbstractFileSystem, folder: str, where: str) -> bytes:
    """``state.json``. Raises ``UnfinishedCheckpointError``."""
    try:
        return read_bytes(filesystem, f"{folder}/{STATE}")
    except FileNotFoundError:
        raise UnfinishedCheckpointError(where) from None


def files_of_size(
    filesystem: fsspec.AbstractFileSystem, folder: str, state: dict[str, Any], where: str
) -> dict[str, Any]:
    """What the state says of each file, if all are there and of their sizes. Raises
    ``DamagedCheckpointError``."""
    there = list_tree(filesystem, folder)
    files: dict[str, Any] = state["files"]
    for name, expected in files.items():
        size = there.get(f"{folder}/{name}")
        if size != expected["bytes"]:
            found = f"has {size} of {expected['bytes']} bytes"
            what = f"{name} {'is missing' if size is None else found}"
            raise DamagedCheckpointError(where, what)
    return files


def download(filesystem: fsspec.AbstractFileSystem, path: str, to: Path) -> None:
    """Copy a file to this machine. Raises ``FileNotFoundError`` and ``StorageError``."""

    def get() -> None:
        filesystem.get_file(path, str(to))

    retrying(get, filesystem, path, doing="read")


class PartialCheckpoints(RemoteCheckpoints):
    """Of the same checkpoints some files alone, enough for one purpose: see ``fetch_partial``."""

    def __init__(
        self, filesystem: fsspec.AbstractFileSystem, root: str, url: str, names: Iterable[str]
    ) -> None:
        super().__init__(filesystem, root, url, keep=1)
        self.names = tuple(names)

    def fetch(self, step: int, scratch: Path) -> Path:
        target = scratch / checkpoint_name(step)
        fetch_partial(self.filesystem, self._folder(step), self.where(step), self.names, target)
        return target


def fetch_partial(
    filesystem: fsspec.AbstractFileSystem,
    folder: str,
    where: str,
    names: Iterable[str] | None,
    target: Path,
) -> None:
    """Make a new folder ``target`` that is a whole checkpoint of the same state and of the files
    ``names`` alone (None: of all): the optimizer, twice the size of the weights, may stay where it
    is.

    ``where`` names the checkpoint for people. Raises ``DamagedCheckpointError`` where a file of it,
    fetched or not, has not its size, or a fetched one is not what was written.
    """
    state = parse_state_json(read_state_bytes(filesystem, folder, where), where)
    expected = files_of_size(filesystem, folder, state, where)
    target.mkdir(parents=True)
    for name in expected if names is None else names:
        if name not in expected:
            raise DamagedCheckpointError(where, f"{name} is missing")
        download(filesystem, f"{folder}/{name}", target / name)
    write_state(target, state)
    for name, found in parse_state_json((target / STATE).read_bytes(), target)["files"].items():
        if found != expected[name]:
            raise DamagedCheckpointError(where, f"{name} was altered: its checksum is wrong")
