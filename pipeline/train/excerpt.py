"""Small copies of checkpoints on an object store, for those who do not go on training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import fsspec

from pipeline.train.choose import checkpoint_name
from pipeline.train.remote import (
    RemoteCheckpoints,
    download,
    files_of_size,
    read_state_bytes,
)
from pipeline.train.seal import STATE, DamagedCheckpointError, seal, unseal


class Excerpts(RemoteCheckpoints):
    """Of the same checkpoints some files alone, enough for one purpose: see ``fetch_excerpt``."""

    def __init__(
        self, filesystem: fsspec.AbstractFileSystem, root: str, url: str, names: Iterable[str]
    ) -> None:
        super().__init__(filesystem, root, url, keep=1)
        self.names = tuple(names)

    def fetch(self, step: int, scratch: Path) -> Path:
        target = scratch / checkpoint_name(step)
        fetch_excerpt(self.filesystem, self._folder(step), self.where(step), self.names, target)
        return target


def fetch_excerpt(
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
    state = unseal(read_state_bytes(filesystem, folder, where), where)
    expected = files_of_size(filesystem, folder, state, where)
    target.mkdir(parents=True)
    for name in expected if names is None else names:
        if name not in expected:
            raise DamagedCheckpointError(where, f"{name} is missing")
        download(filesystem, f"{folder}/{name}", target / name)
    seal(target, state)
    for name, found in unseal((target / STATE).read_bytes(), target)["files"].items():
        if found != expected[name]:
            raise DamagedCheckpointError(where, f"{name} was altered: its checksum is wrong")
