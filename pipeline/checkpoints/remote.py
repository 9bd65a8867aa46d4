"""Checkpoints on an object store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from pipeline.checkpoints.integrity import (
    STATE,
    DamagedCheckpointError,
    UnfinishedCheckpointError,
    parse_state_json,
    write_state,
)
from pipeline.checkpoints.selection import checkpoint_name, steps_of, to_prune
from pipeline.storage.files import list_tree, publish, read_bytes, remove, retrying

if TYPE_CHECKING:
    from pipeline.checkpoints.state import CheckpointContents


class RemoteCheckpoints:
    """Folders ``checkpoint-STEP`` below ``root``; the latest ``keep`` stay.

    Object stores have no rename. Files are uploaded one by one, each atomically; ``state.json``,
    without which a folder is not a checkpoint, is uploaded last and deleted first.
    """

    def __init__(
        self, filesystem: fsspec.AbstractFileSystem, root: str, url: str, keep: int
    ) -> None:
        """``url`` names ``root`` in messages."""
        self.filesystem = filesystem
        self.root = root
        self.url = url
        self.keep = keep

    def save(self, step: int, contents: CheckpointContents) -> None:
        with tempfile.TemporaryDirectory(prefix="haste-checkpoint-") as scratch:
            contents.write(Path(scratch))
            self._remove(step)  # files of an interrupted upload
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
        """Download the files that the state lists if all have their sizes; the state comes last."""
        target = scratch / checkpoint_name(step)
        if (target / STATE).exists():  # fetched already by another worker of this node
            return target
        data = self.state(step)
        folder, where = self._folder(step), self.where(step)
        target.mkdir(parents=True, exist_ok=True)
        for name in files_of_size(self.filesystem, folder, parse_state_json(data, where), where):
            download(self.filesystem, f"{folder}/{name}", target / name)
        (target / STATE).write_bytes(data)
        return target

    def _files(self) -> list[tuple[str, str]]:
        """(folder, rest of the path) of every file below the root."""
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
    """The state's entry (bytes, sha256) of each file, if all exist with their sizes. Raises
    ``DamagedCheckpointError``."""
    sizes = list_tree(filesystem, folder)
    files: dict[str, Any] = state["files"]
    for name, expected in files.items():
        size = sizes.get(f"{folder}/{name}")
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
    """Checkpoints of which only the files ``names`` are fetched (``fetch_partial``)."""

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
    """Download the state and the files ``names`` (None: all) into the new folder ``target``, which
    is then a valid checkpoint; the optimizer, twice the size of the weights, can be left out.

    ``where`` names the checkpoint in messages. Raises ``DamagedCheckpointError`` where any file of
    it has a wrong size, or a downloaded one a wrong checksum.
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
