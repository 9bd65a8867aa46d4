"""Selection and signalling of the processes of one disturbed run.

All are started with a mark in their environment. Ray's workers overwrite their environment with
their titles, so they are found as descendants of marked processes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

MARK = "HASTE_FAULTS_ID"


class Process(NamedTuple):
    pid: int
    parent: int
    title: str


def processes_of(mark: str) -> list[Process]:
    """Live processes that were started with ``mark``, and their descendants; not this process."""
    table = _table()
    variable = f"{MARK}={mark}".encode()
    found = {pid for pid in table if variable in _read(pid, "environ").split(b"\0")}
    return [table[pid] for pid in sorted(_with_descendants(found, table) - {os.getpid()})]


def descendants(pid: int) -> list[int]:
    """Ids of the live children of a process, of theirs, and so on."""
    return sorted(_with_descendants({pid}, _table()) - {pid})


def _with_descendants(found: set[int], table: Mapping[int, Process]) -> set[int]:
    while more := {p.pid for p in table.values() if p.parent in found} - found:
        found = found | more
    return found


def pids_with_title(mark: str, word: str) -> list[int]:
    """Ids of the processes whose title contains ``word``."""
    return [process.pid for process in processes_of(mark) if word in process.title]


def kill_all(mark: str) -> None:
    """Send SIGKILL to all until none is left, at most 20 seconds."""
    deadline = time.monotonic() + 20
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        for process in left:
            send(process.pid, signal.SIGKILL)
        time.sleep(0.1)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal; a process that has already ended is ignored."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """Send SIGSTOP, and SIGCONT at the end."""
    pids = list(pids)
    try:
        for pid in pids:
            send(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            send(pid, signal.SIGCONT)


def _table() -> dict[int, Process]:
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        # pid (name) state parent ...; the name may hold anything
        state, parent, *_ = _read(int(entry.name), "stat").rpartition(b")")[2].split() or (b"Z", 0)
        if state != b"Z":
            title = _read(int(entry.name), "cmdline").replace(b"\0", b" ").decode(errors="replace")
            found[int(entry.name)] = Process(int(entry.name), int(parent), title.strip())
    return found


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has ended, or belongs to another user
        return b""
