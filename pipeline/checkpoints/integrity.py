"""Integrity of a checkpoint: sizes and checksums of its files, listed in ``state.json``.

``state.json`` is written last. It holds the size and SHA-256 of every other file and a SHA-256 of
itself, so that any missing, short or altered file is detected.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from schemas.errors import UserError

STATE = "state.json"
SELF = "sha256"
"""Key of the checksum of everything else in ``state.json``."""


class DamagedCheckpointError(UserError):
    """A checkpoint has a missing, short or altered file, which the message names."""

    def __init__(self, where: str | Path, what: str) -> None:
        super().__init__(f"checkpoint '{where}' is damaged: {what}")


class NonFiniteCheckpointError(DamagedCheckpointError):
    """A checkpoint holds numbers that are not finite: its files are whole, its run had died."""

    def __init__(self, where: str | Path, what: str) -> None:
        UserError.__init__(self, f"checkpoint '{where}' cannot be continued: {what} not finite")


class UnfinishedCheckpointError(DamagedCheckpointError):
    """Files of an interrupted upload, which never were a checkpoint."""

    def __init__(self, where: str | Path) -> None:
        super().__init__(where, f"{STATE}, which is uploaded last, is missing")


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Flush all files in ``folder`` to disk and write ``state.json`` with their checksums."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    state = {**state, "files": files}
    with (folder / STATE).open("w") as file:
        json.dump({**state, SELF: _checksum(state)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def parse_state_json(data: bytes, where: str | Path) -> dict[str, Any]:
    """Parse and verify the bytes of a ``state.json``. Raises ``DamagedCheckpointError``."""
    try:
        state = json.loads(data)
        checksum = state.pop(SELF)
        files = state["files"].items()
        valid = all(name == Path(name).name and file["bytes"] >= 0 for name, file in files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is not a checkpoint's state"
        raise DamagedCheckpointError(where, f"{STATE}: {reason}") from None
    if checksum != _checksum(state) or not valid:
        raise DamagedCheckpointError(where, f"{STATE}: its checksum is wrong")
    return dict(state)


def verify(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Verify the size and, with ``hashes``, the checksum of every file. Returns the state; raises
    ``DamagedCheckpointError``."""
    try:
        state = parse_state_json((folder / STATE).read_bytes(), folder)
    except FileNotFoundError:
        raise DamagedCheckpointError(folder, f"{STATE} is missing") from None
    except OSError as error:
        raise DamagedCheckpointError(folder, f"{STATE}: {error.strerror}") from None
    for name, expected in state["files"].items():
        try:
            fault = _fault(folder / name, expected, hashes)
        except FileNotFoundError:
            fault = "is missing"
        except OSError as error:
            fault = f"cannot be read: {error.strerror}"
        if fault is not None:
            raise DamagedCheckpointError(folder, f"{name} {fault}")
    return state


def _fault(path: Path, expected: dict[str, Any], hashes: bool) -> str | None:
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"has {size} of {expected['bytes']} bytes"
    if hashes:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return "was altered: its checksum is wrong"
    return None


def _checksum(state: dict[str, Any]) -> str:
    # Numbers and strings survive a round trip through JSON, so that the text is the same when read.
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
