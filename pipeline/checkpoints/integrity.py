"""Integrity of a checkpoint: sizes and checksums of its files, listed in ``state.json``.

``state.json`` is written last. It holds the size and SHA-256 of every other file and a SHA-256 of
itself, so that any missing, short or altered file is detected.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from schemas.errors import UserError

STATE = "state.json"
SHARES = "shares"
"""Key of the names of the parts of each file, in the state of a checkpoint that several workers
wrote; without it, no file is divided."""
SELF = "sha256"
"""Key of the checksum of everything else in ``state.json``."""
MAX_THREADS = 8
"""Files that are hashed at a time."""


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


class HashedFile:
    """A new file that is hashed while it is written, and flushed to disk at the end of the context.

    ``write`` does not hold Python's lock for large data, so that another thread trains on. Its
    error leaves the context as it is, because ``torch.save`` replaces it by one of its own.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._error: OSError | None = None

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file as file:
            if error is None:
                file.flush()
                os.fsync(file.fileno())
        if self._error is not None:
            raise self._error from None

    def write(self, data: Any) -> int:
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = self._error or error
            raise

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        """Checksum of what has been written."""
        return self._hash.hexdigest()


def write_state(
    folder: Path, state: dict[str, Any], checksums: Mapping[str, str] | None = None
) -> None:
    """Write ``state.json`` with the checksums of all files in ``folder``. Those whose ``checksums``
    are not known from a ``HashedFile`` are read, and flushed to disk."""
    known = checksums or {}
    files = {}
    for path in sorted(folder.iterdir()):
        digest = known.get(path.name)
        if digest is None:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    write_listed_state(folder, state, files)


def write_listed_state(
    folder: Path, state: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write ``state.json``, and flush it to disk. ``files``: ``bytes`` and ``sha256`` of each."""
    state = {**state, "files": dict(files)}
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
        parts = {part for name in state.get(SHARES, {}) for part in parts_of(state, name)}
        # a file that is not a part would be left out by readers
        valid = valid and (SHARES not in state or state["files"].keys() <= parts)
        valid = valid and all(part == Path(part).name for part in parts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is not a checkpoint's state"
        raise DamagedCheckpointError(where, f"{STATE}: {reason}") from None
    if checksum != _checksum(state) or not valid:
        raise DamagedCheckpointError(where, f"{STATE}: its checksum is wrong")
    return dict(state)


def parts_of(state: Mapping[str, Any], name: str) -> list[str]:
    """Names of the files that hold what the file ``name`` does in a checkpoint of one worker."""
    parts: list[str] = state.get(SHARES, {}).get(name, [name])
    return parts


def part_paths(folder: Path, name: str) -> list[Path]:
    """Paths of ``parts_of`` a checkpoint's folder. Raises ``DamagedCheckpointError``."""
    try:
        state = parse_state_json((folder / STATE).read_bytes(), folder)
    except FileNotFoundError:
        return [folder / name]
    except OSError as error:
        raise DamagedCheckpointError(folder, f"{STATE}: {error.strerror}") from None
    return [folder / part for part in parts_of(state, name)]


def verify(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Verify the size and, with ``hashes``, the checksum of every file. Returns the state; raises
    ``DamagedCheckpointError``."""
    try:
        state = parse_state_json((folder / STATE).read_bytes(), folder)
    except FileNotFoundError:
        raise DamagedCheckpointError(folder, f"{STATE} is missing") from None
    except OSError as error:
        raise DamagedCheckpointError(folder, f"{STATE}: {error.strerror}") from None
    files: dict[str, dict[str, Any]] = state["files"]
    for check in (_size_fault, _hash_fault) if hashes else (_size_fault,):
        with ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="verify") as pool:
            faults = pool.map(lambda name, check=check: check(folder / name, files[name]), files)
            for name, fault in zip(files, faults, strict=True):
                if fault is not None:
                    raise DamagedCheckpointError(folder, f"{name} {fault}")
    return state


def _size_fault(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if size == expected["bytes"] else f"has {size} of {expected['bytes']} bytes"


def _hash_fault(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == expected["sha256"] else "was altered: its checksum is wrong"


def _checksum(state: dict[str, Any]) -> str:
    # Numbers and strings survive a round trip through JSON, so that the text is the same when read.
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
