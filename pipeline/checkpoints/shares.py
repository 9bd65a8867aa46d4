"""Shares of a checkpoint that several workers write, each into files of its own.

A worker announces its share by a small file beside it, and the main rank publishes the checkpoint
when it has found all of them. Threads agree through the storage, because collective operations of a
thread would mix with those of the training steps, and because a process that dies announces
nothing: its checkpoint is never published.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import fsspec

from pipeline.storage.files import StorageError, list_folder, read_bytes, remove, write_atomic
from schemas.errors import plain_text

MIN_BYTES = 1 << 28
"""Bytes of a share at least, on average. A worker hashes and writes them within a second or two; a
smaller one would cost about as much in files, requests and waiting as it saves."""
LIMIT_SECONDS = 480.0
"""Seconds that the main rank, when it has written its own share, waits for the others, which are of
equal size. Workers that wait for this one in a collective meanwhile are ended after 30 minutes, the
limit that Ray Train sets."""
POLL_SECONDS = 0.5

Piece = tuple[str, Any]
"""File of an undivided checkpoint, and the name of a tensor or the number of a parameter in it."""
Files = Mapping[str, Mapping[str, Any]]
"""By the name of a file: ``bytes``, ``sha256``, and ``of``, the file of an undivided checkpoint of
which it is a part."""


@dataclass(frozen=True)
class Share:
    """One worker's part of a checkpoint."""

    number: int
    """From 0 on; the worker of share 0 publishes."""
    count: int
    token: str
    """Drawn anew for every checkpoint, the same in all shares. It is in the names of the files, so
    that those of an interrupted attempt at the same step are neither overwritten nor published."""
    plan: str
    """Checksum of the division, by which workers that hold different tensors are found."""

    def file(self, name: str) -> str:
        """Name of this share's part of the file ``name`` of an undivided checkpoint."""
        stem, _, kind = name.rpartition(".")
        return f"{stem}-{self.number + 1}-of-{self.count}-{self.token}.{kind}"

    def announcement(self, number: int) -> str:
        return f"share-{number + 1}-of-{self.count}-{self.token}.json"


def share_count(nbytes: int, workers: int) -> int:
    """Number of shares of a state of ``nbytes``: 1 where it is too small to be divided."""
    return max(1, min(workers, nbytes // MIN_BYTES))


def divide(sizes: Mapping[Piece, int], count: int) -> dict[Piece, int]:
    """The share of each piece: the largest first, each to the share that is smallest so far. A
    function of its arguments, whatever their order, so that all workers agree on it."""
    loads = [(0, number) for number in range(count)]
    owners = {}
    for piece in sorted(sizes, key=lambda piece: (-sizes[piece], piece[0], str(piece[1]))):
        load, owners[piece] = loads[0]
        heapq.heapreplace(loads, (load + sizes[piece], owners[piece]))
    return owners


def plan_checksum(sizes: Mapping[Piece, int], owners: Mapping[Piece, int]) -> str:
    rows = sorted(
        (name, str(key), sizes[name, key], owner) for (name, key), owner in owners.items()
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def announce(
    filesystem: fsspec.AbstractFileSystem, folder: str, share: Share, write: Callable[[], Files]
) -> None:
    """Let ``write`` write this share's files into ``folder``, then announce them; or its error,
    so that the main rank need not wait, unless it is that of the storage itself."""
    path = f"{folder}/{share.announcement(share.number)}"
    try:
        content = {"plan": share.plan, "files": write()}
    except StorageError:
        raise
    except Exception as error:
        reason = plain_text(str(error)) or type(error).__name__
        with suppress(Exception):
            write_atomic(filesystem, path, json.dumps({"error": reason}).encode())
        raise
    write_atomic(filesystem, path, json.dumps(content).encode())


def collect(
    filesystem: fsspec.AbstractFileSystem, folder: str, share: Share, where: str
) -> dict[str, Any]:
    """Files of all other shares in ``folder``, once they are announced; the announcements are
    removed. ``where`` names the checkpoint in messages.

    Raises ``StorageError``, with which the run may be restarted from the checkpoint before.
    """
    awaited = {share.announcement(number): number for number in range(1, share.count)}
    found: dict[str, Any] = {}
    end = time.monotonic() + LIMIT_SECONDS
    while awaited:
        for path in list_folder(filesystem, folder):
            number = awaited.pop(path.rpartition("/")[2], None)
            if number is not None:
                content = json.loads(read_bytes(filesystem, path))
                found |= _files_of(content, share, f"share {number + 1} of {share.count}", where)
        if awaited:
            if time.monotonic() > end:
                missing = ", ".join(str(number + 1) for number in awaited.values())
                raise StorageError(
                    f"checkpoint '{where}' is not published: share {missing} of {share.count} was "
                    f"not written within {LIMIT_SECONDS:.0f} s; does its worker see this folder?"
                )
            time.sleep(POLL_SECONDS)
    for number in range(1, share.count):
        remove(filesystem, f"{folder}/{share.announcement(number)}")
    return found


def _files_of(content: Mapping[str, Any], share: Share, which: str, where: str) -> dict[str, Any]:
    if "error" in content:
        raise StorageError(
            f"checkpoint '{where}' is not published: {which} failed: {content['error']}"
        )
    if content["plan"] != share.plan:
        raise StorageError(
            f"checkpoint '{where}' is not published: {which} is of a worker that holds other "
            "tensors than this one"
        )
    files: dict[str, Any] = content["files"]
    return files
