"""Checkpoints on an object store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from pipeline.checkpoints.integrity import (
    MAX_THREADS,
    STATE,
    DamagedCheckpointError,
    UnfinishedCheckpointError,
    parse_state_json,
    parts_of,
    write_state,
)
from pipeline.checkpoints.selection import checkpoint_name, steps_of, to_prune
from pipeline.checkpoints.shares import Share, announce, collect
from pipeline.storage.files import (
    StorageError,
    list_tree,
    publish,
    read_bytes,
    remove,
    retrying,
)

if TYPE_CHECKING:
    from pipeline.checkpoints.state import CheckpointContents


class RemoteCheckpoints:
    """Folders ``checkpoint-STEP`` below ``root``; the latest ``keep`` stay.

    Object stores have no rename. Files are uploaded one by one, each atomically; ``state.json``,
    without which a folder is not a checkpoint, is uploaded last and deleted first. Where several
    workers write one, each uploads its files, and the main rank ``state.json`` after all of them.
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
            if contents.share is not None:
                self._save_shared(step, contents, contents.share, Path(scratch))
            else:
                contents.write(Path(scratch))
                self._remove(step)  # files of an interrupted upload
                self._upload(step, Path(scratch))
        if contents.share is not None and contents.share.number:
            return
        finished = steps_of({folder for folder, file in self._files() if file == STATE})
        kept = {step, *finished} - set(to_prune(finished, step, self.keep))
        for other in self.steps():
            if other not in kept:
                self._remove(other)

    def _save_shared(
        self, step: int, contents: CheckpointContents, share: Share, scratch: Path
    ) -> None:
        """Upload a share; on the main rank, publish the checkpoint when all are uploaded."""
        folder, where = self._folder(step), self.where(step)

        def upload() -> dict[str, dict[str, Any]]:
            files = contents.write_share(scratch)
            self._upload(step, scratch)
            return files

        if share.number:
            announce(self.filesystem, folder, share, upload)
            return
        self._remove(step, but=share.token)
        files = upload() | collect(self.filesystem, folder, share, where)
        try:
            files_of_size(self.filesystem, folder, {"files": files}, where)
        except DamagedCheckpointError as error:
            raise StorageError(f"{error}; it is not published") from None
        contents.write_shared_state(scratch, files)
        self._upload(step, scratch)

    def _upload(self, step: int, scratch: Path) -> None:
        """Move all files of a local folder here, the state last."""
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == STATE):
            publish(self.filesystem, path, f"{self._folder(step)}/{path.name}")

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
        names = files_of_size(self.filesystem, folder, parse_state_json(data, where), where)
        download_all(self.filesystem, folder, names, target)
        (target / STATE).write_bytes(data)
        return target

    def _files(self) -> list[tuple[str, str]]:
        """(folder, rest of the path) of every file below the root."""
        paths = list_tree(self.filesystem, self.root)
        below = (path.removeprefix(f"{self.root}/").partition("/") for path in paths)
        return [(folder, file) for folder, _, file in below]

    def _folder(self, step: int) -> str:
        return f"{self.root}/{checkpoint_name(step)}"

    def _remove(self, step: int, *, but: str | None = None) -> None:
        """Delete all files of a step; with ``but``, those whose names hold it stay."""
        files = [
            path
            for path in list_tree(self.filesystem, self._folder(step))
            if but is None or but not in path.rpartition("/")[2]
        ]
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


def download_all(
    filesystem: fsspec.AbstractFileSystem, folder: str, names: Iterable[str], to: Path
) -> None:
    """Copy files of a folder to a local one, several at a time."""

    def copy(name: str) -> None:
        download(filesystem, f"{folder}/{name}", to / name)

    with ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="download") as pool:
        list(pool.map(copy, names))


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
    """Download the state and the files ``names``, or all parts of them (None: all files), into the
    new folder ``target``, which is then a valid checkpoint; the optimizer, twice the size of the
    weights, can be left out.

    ``where`` names the checkpoint in messages. Raises ``DamagedCheckpointError`` where any file of
    it has a wrong size, or a downloaded one a wrong checksum.
    """
    state = parse_state_json(read_state_bytes(filesystem, folder, where), where)
    expected = files_of_size(filesystem, folder, state, where)
    target.mkdir(parents=True)
    if names is None:
        wanted = list(expected)
    else:
        wanted = [part for name in names for part in parts_of(state, name)]
    for name in wanted:
        if name not in expected:
            raise DamagedCheckpointError(where, f"{name} is missing")
    download_all(filesystem, folder, wanted, target)
    write_state(target, state)
    for name, found in parse_state_json((target / STATE).read_bytes(), target)["files"].items():
        if found != expected[name]:
            raise DamagedCheckpointError(where, f"{name} was altered: its checksum is wrong")
