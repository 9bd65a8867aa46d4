"""Checkpoints on an object store."""

from __future__ import annotations

import tempfile
from pathlib import Path

import fsspec

from pipeline.files import list_tree, publish, read_bytes, remove, retrying
from pipeline.train.choose import Write, checkpoint_name, outdated, steps_of
from pipeline.train.seal import STATE, DamagedCheckpointError, unseal


class RemoteCheckpoints:
    """Folders ``checkpoint-STEP`` below ``root``; the newest ``keep`` stay.

    There is no rename: files are uploaded one by one, each of them whole or not there, and
    ``state.json``, without which a checkpoint is damaged, comes last and goes first.
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
        for old in outdated(self.steps(), step, self.keep):
            self._remove(old)

    def steps(self) -> list[int]:
        # by their files: an empty folder is but a name
        files = list_tree(self.filesystem, self.root)
        return steps_of({path.removeprefix(f"{self.root}/").split("/")[0] for path in files})

    def where(self, step: int) -> str:
        return f"{self.url}/{checkpoint_name(step)}"

    def state(self, step: int) -> bytes:
        try:
            return read_bytes(self.filesystem, f"{self._folder(step)}/{STATE}")
        except FileNotFoundError:
            raise DamagedCheckpointError(self.where(step), f"{STATE} is missing") from None

    def fetch(self, step: int, scratch: Path) -> Path:
        """Downloads the files that the state lists, if all have their sizes; the state last."""
        target = scratch / checkpoint_name(step)
        if (target / STATE).exists():  # fetched already, for another worker of this machine
            return target
        data = self.state(step)
        there = list_tree(self.filesystem, self._folder(step))
        target.mkdir(parents=True, exist_ok=True)
        for name, expected in unseal(data, self.where(step))["files"].items():
            path = f"{self._folder(step)}/{name}"
            size = there.get(path)
            if size != expected["bytes"]:
                found = f"has {size} of {expected['bytes']} bytes"
                what = f"{name} {'is missing' if size is None else found}"
                raise DamagedCheckpointError(self.where(step), what)
            self._download(path, target / name)
        (target / STATE).write_bytes(data)
        return target

    def _download(self, path: str, to: Path) -> None:
        def get() -> None:
            self.filesystem.get_file(path, str(to))

        retrying(get, self.filesystem, path, doing="read")

    def _folder(self, step: int) -> str:
        return f"{self.root}/{checkpoint_name(step)}"

    def _remove(self, step: int) -> None:
        files = list_tree(self.filesystem, self._folder(step))
        for path in sorted(files, key=lambda path: not path.endswith(f"/{STATE}")):
            remove(self.filesystem, path)
