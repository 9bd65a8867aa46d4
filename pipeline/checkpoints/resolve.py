"""Resolution of ``--checkpoint`` to one checkpoint, and a local copy of it while it is loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from pipeline.checkpoints.integrity import (
    STATE,
    DamagedCheckpointError,
    UnfinishedCheckpointError,
    parse_state_json,
    parts_of,
)
from pipeline.checkpoints.local import latest_checkpoint
from pipeline.checkpoints.remote import (
    PartialCheckpoints,
    download,
    fetch_partial,
    read_state_bytes,
)
from pipeline.checkpoints.selection import checkpoint_name, is_weights_file, latest_valid
from pipeline.cli.progress import saying
from pipeline.storage.files import absolute_url, exists, file_size, is_local, open_url, redact
from schemas.errors import UserError
from schemas.sample import Weights


def require_checkpoint(name: str | None) -> str:
    """``--checkpoint``, given and, where it is local, existing: what can be known without reading
    it. Raises ``UserError``."""
    if name is None:
        raise UserError(
            "--checkpoint is missing: the folder or URL of a run or of one checkpoint, or a .pt "
            "file"
        )
    path = Path(absolute_url(name))
    if "://" not in name and not path.exists() and not is_weights_file(path):
        raise UserError(f"--checkpoint '{name}' holds no checkpoint")
    return name


def find_checkpoint(name: str | None, step: int | None = None) -> str:
    """Absolute path or URL of the .pt file or checkpoint that ``--checkpoint`` names. For a run, it
    is the checkpoint of ``step`` if it exists, else the latest valid one.

    Only the state of a remote checkpoint is fetched. Raises ``UserError``.
    """
    name = require_checkpoint(name)
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
    latest = latest_checkpoint(path)
    if latest is None:
        raise UserError(f"--checkpoint '{name}' holds no checkpoint")
    return str(latest)


def holds_weights(filesystem: fsspec.AbstractFileSystem, folder: str, weights: Weights) -> bool:
    """True if the folder of a checkpoint has these weights, in one file or in parts."""
    name = f"{weights}.safetensors"
    if exists(filesystem, f"{folder}/{name}"):
        return True
    try:
        state = parse_state_json(read_state_bytes(filesystem, folder, folder), folder)
    except DamagedCheckpointError:
        return False
    return all(exists(filesystem, f"{folder}/{part}") for part in parts_of(state, name))


@contextmanager
def local_copy(place: str, weights: Weights | None) -> Iterator[Path]:
    """Local path of a result of ``find_checkpoint``. A remote one is copied for the time of the
    context: the file of ``weights`` only, or all files (None). Raises ``UserError``."""
    if "://" not in place:
        yield Path(place)
        return
    filesystem, root = open_url(place, what="--checkpoint")
    shown = redact(place)
    with tempfile.TemporaryDirectory(prefix="haste-checkpoint-") as scratch:
        copy = Path(scratch) / root.rpartition("/")[2]
        try:
            with saying(f"fetching the checkpoint '{shown}'"):
                if is_weights_file(copy):
                    download(filesystem, root, copy)
                else:
                    names = None if weights is None else (f"{weights}.safetensors",)
                    fetch_partial(filesystem, root, shown, names, copy)
        except (FileNotFoundError, UnfinishedCheckpointError):
            raise UserError(
                f"--checkpoint '{shown}' does not exist any more, or is not visible from this "
                "machine: a run removes its older checkpoints while it trains; name one "
                "that is kept"
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
