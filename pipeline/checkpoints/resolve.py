"""Which checkpoint is drawn from, wherever it lies, and a copy of it for the time of loading."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from pipeline.checkpoints.integrity import STATE, UnfinishedCheckpointError
from pipeline.checkpoints.local import latest_checkpoint
from pipeline.checkpoints.remote import PartialCheckpoints, download, fetch_partial
from pipeline.checkpoints.selection import checkpoint_name, latest_valid
from pipeline.checkpoints.student import is_weights_file
from pipeline.storage.files import absolute_url, exists, file_size, is_local, open_url, redact
from schemas.errors import UserError
from schemas.sample import Weights


def find_checkpoint(name: str | None, step: int | None = None) -> str:
    """What ``--checkpoint`` names, as an absolute path or a URL: a .pt file, one checkpoint, or of
    a run the checkpoint of ``step``, if it is there, else the newest whole one.

    Of one that is far away nothing is fetched but its state. Raises ``UserError``.
    """
    if name is None:
        raise UserError(
            "--checkpoint is missing: the folder or URL of a run or of one checkpoint, or a .pt "
            "file"
        )
    if "://" in name:
        filesystem, root = open_url(name, what="--checkpoint")
        if not is_local(filesystem):
            return _find_remote(filesystem, root, name.rstrip("/"), step)
        name = root
    path = Path(absolute_url(name))
    if is_weights_file(path):
        return str(path)
    if step is not None and (path / checkpoint_name(step) / STATE).exists():
        path /= checkpoint_name(step)
    newest = latest_checkpoint(path)
    if newest is None:
        raise UserError(f"--checkpoint '{name}' holds no checkpoint")
    return str(newest)


@contextmanager
def local_copy(place: str, weights: Weights | None) -> Iterator[Path]:
    """What ``find_checkpoint`` found as a path of this machine, where need be a copy that goes when
    the context ends: of these weights alone, or of all that there is. Raises ``UserError``."""
    if "://" not in place:
        yield Path(place)
        return
    filesystem, root = open_url(place, what="--checkpoint")
    shown = redact(place)
    with tempfile.TemporaryDirectory(prefix="haste-checkpoint-") as scratch:
        copy = Path(scratch) / root.rpartition("/")[2]
        try:
            if is_weights_file(copy):
                download(filesystem, root, copy)
            else:
                names = None if weights is None else (f"{weights}.safetensors",)
                fetch_partial(filesystem, root, shown, names, copy)
        except (FileNotFoundError, UnfinishedCheckpointError):
            raise UserError(
                f"--checkpoint '{shown}' is not there any more, or cannot be seen from here: a run "
                "that trains removes its older checkpoints; name one that stays"
            ) from None
        try:
            yield copy
        except UserError as error:
            raise UserError(str(error).replace(str(copy), shown)) from None


def _find_remote(
    filesystem: fsspec.AbstractFileSystem, root: str, url: str, step: int | None
) -> str:
    shown = redact(url)
    if is_weights_file(Path(root)):
        try:
            file_size(filesystem, root)
        except FileNotFoundError:
            raise UserError(f"--checkpoint '{shown}': there is no such file") from None
        return url
    with tempfile.TemporaryDirectory(prefix="haste-checkpoint-") as scratch:
        copy = Path(scratch) / "state"
        if exists(filesystem, f"{root}/{STATE}"):
            fetch_partial(filesystem, root, shown, (), copy)
            return url
        if step is not None and exists(filesystem, f"{root}/{checkpoint_name(step)}/{STATE}"):
            name = checkpoint_name(step)
            fetch_partial(filesystem, f"{root}/{name}", f"{shown}/{name}", (), copy)
            return f"{url}/{name}"
        found = latest_valid(PartialCheckpoints(filesystem, root, shown, ()), Path(scratch))
    if found is None:
        raise UserError(f"--checkpoint '{shown}' holds no checkpoint")
    return f"{url}/{checkpoint_name(found[0])}"
