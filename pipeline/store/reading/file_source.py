"""From ranges of a stream's files to their bytes: out of memory, a local disk, or storage."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import NamedTuple, TypeVar

import fsspec

from pipeline.storage.files import is_local, read_directly, read_ranges
from pipeline.storage.local import GAP
from pipeline.store.reading.disk_cache import DiskCache
from pipeline.store.reading.memory_cache import MemoryBudget, SharedCache
from pipeline.store.reading.shard_index import FileTable

T = TypeVar("T")

REQUEST_BYTES = 256 << 10
"""What one more request costs, in bytes that could have been read instead: 3 ms at 80 MB/s, as
several are under way at a time."""

REMEMBERED = 1 << 14
"""Files of which a source knows what became of them on the disk: those of the windows under way."""

WantsWhole = Callable[[int, int], bool]
"""(bytes of a file, its samples) -> whether to fetch it whole, and keep it while its window lasts,
rather than the ranges of the wanted rows."""


def up_to(limit: int) -> WantsWhole:
    """Whole where the file has no more bytes than that."""
    return lambda size, samples: size <= limit


def for_share(world_size: int) -> WantsWhole:
    """Whole where that costs less than this rank's share of a file, row by row.

    Every rank takes about one in ``world_size`` samples of each shard, each with one request:
    a rank that needs all of a file, or most, or small ones, takes it whole, once per window.
    """

    def wants_whole(size: int, samples: int) -> bool:
        rows = -(-samples // world_size)
        return size + REQUEST_BYTES <= rows * (size / max(1, samples) + REQUEST_BYTES)

    return wants_whole


class Pieces(NamedTuple):
    """Bytes of the ranges that were asked for; fewer where the file ends earlier."""

    data: list[memoryview]
    cached: bool
    """Whether they lay on a local disk meanwhile, where anything may have happened to them."""


class FileSource:
    """The files of one stream. Safe to use from several threads.

    ``opens`` and ``bytes_read`` count what storage was asked for. Raises ``FileNotFoundError``.
    """

    def __init__(
        self,
        filesystem: fsspec.AbstractFileSystem,
        root: str,
        *,
        wants_whole: WantsWhole,
        budget: MemoryBudget | None = None,
        disk: DiskCache | None = None,
    ) -> None:
        self.opens = 0
        self.bytes_read = 0
        self.kept: SharedCache[tuple[bytes, bool]] = SharedCache(budget)
        """Whole files by path, and whether they came from the disk."""
        self._filesystem = filesystem
        self._root = root
        self._wants_whole = wants_whole
        self._disk = disk
        self._tried: OrderedDict[str, tuple[int, bool]] = OrderedDict()
        """Files that were to lie on the disk, by hash: where their window ends, and if they did."""
        self._begun: OrderedDict[str, int] = OrderedDict()
        """Files of which something was read directly, and where their window ends."""
        self.closed = threading.Event()
        """Set by ``close``, or before it, so that reads under way give up at their next attempt."""
        self._lock = threading.Lock()
        self._filling = threading.Lock()

    def read(
        self, file: FileTable, ranges: Sequence[tuple[int, int]], until: int, *, anew: bool = False
    ) -> Pieces:
        """The bytes of each (offset, size). ``until`` is the position up to which more of the file
        will be wanted. ``anew``: what lies on the disk is wrong; forget it."""
        if anew:
            self.kept.discard(file.file)
            if self._disk is not None:
                self._disk.discard(file.sha256)
                self._tried.pop(file.sha256, None)
        if self._wants_whole(file.bytes, len(file.offsets)) or file.file in self.kept:
            whole = self.kept.get(
                file.file, lambda: self._whole(file, until, anew), size=file.bytes, until=until
            )
            if whole is not None:
                view = memoryview(whole[0])
                return Pieces([view[start : start + size] for start, size in ranges], whole[1])
        return self._ranges(file, ranges, until, anew)

    @property
    def is_direct(self) -> bool:
        """Whether ``read_directly`` can be used: the system's own cache of a local file serves
        better than a copy in memory."""
        return self._disk is None and is_local(self._filesystem)

    def read_directly(
        self, file: FileTable, read: Callable[[int], tuple[T, int]], until: int
    ) -> T | None:
        """What ``read`` makes of the file's descriptor, without a copy between, beside the number
        of bytes that it took; None where it is no regular file. ``until`` as in the method
        ``read``. Local files only."""
        self._count(requests=1)
        ahead = self._begun.get(file.file) != until  # else the system was asked for all of it
        if ahead:
            self._begun[file.file] = until
            if len(self._begun) > REMEMBERED:
                self._begun.popitem(last=False)
            ahead = self._wants_whole(file.bytes, len(file.offsets))
        path = f"{self._root}/{file.file}"
        made = read_directly(self._filesystem, path, read, ahead=ahead)
        if made is None:
            return None
        self._count(read=made[1])
        return made[0]

    def close(self) -> None:
        """Let go of what is kept, and ask storage for nothing more."""
        self.closed.set()
        self.kept.clear()

    def _whole(self, file: FileTable, until: int, anew: bool) -> tuple[bytes, bool]:
        local = None if anew else self._local(file)
        if local is not None:
            try:
                return local.read_bytes(), True
            except OSError:  # another worker made room
                pass
        if self._disk is None:
            return self._fetch(file), False
        data = self._disk.fill(file.sha256, file.bytes, lambda: self._fetch(file), until)
        return self._whole(file, until, anew=False) if data is None else (data, False)

    def _ranges(
        self, file: FileTable, ranges: Sequence[tuple[int, int]], until: int, anew: bool
    ) -> Pieces:
        spans: list[list[int]] = []
        homes = [0] * len(ranges)
        for number in sorted(range(len(ranges)), key=ranges.__getitem__):
            start, size = ranges[number]
            if spans and 0 <= start - spans[-1][1] <= GAP:
                spans[-1][1] = start + size
            else:
                spans.append([start, start + size])
            homes[number] = len(spans) - 1
        blocks, cached = self._spans(file, [(begin, end) for begin, end in spans], until, anew)
        views = [memoryview(block) for block in blocks]
        pieces = [
            views[home][start - spans[home][0] :][:size]
            for home, (start, size) in zip(homes, ranges, strict=True)
        ]
        return Pieces(pieces, cached)

    def _spans(
        self, file: FileTable, spans: list[tuple[int, int]], until: int, anew: bool
    ) -> tuple[list[bytes], bool]:
        if self._disk is not None and not anew:
            data = self._fill_disk(file, until)
            if data is not None:
                return [data[begin:end] for begin, end in spans], False
            local = self._local(file)
            if local is not None:
                try:
                    return _read_local(local, spans), True
                except OSError:  # another worker made room
                    pass
        self._count(requests=1)
        blocks = read_ranges(self._filesystem, f"{self._root}/{file.file}", spans)
        self._count(read=sum(len(block) for block in blocks))
        return blocks, False

    def _fill_disk(self, file: FileTable, until: int) -> bytes | None:
        """Fetch a file whole for later epochs and the other workers of this node, though only parts
        are wanted now; one at a time, as they pass through memory beyond its budget. Its bytes,
        where it was fetched: once per window at most, as what is gone by then would be again."""
        disk = self._disk
        if disk is None:
            return None
        if file.bytes > disk.limit:
            disk.overflows(-1)  # others may fit
            return None
        if self._local(file) is not None:
            self._remember(file, until, True)
            return None
        with self._filling:
            if self._local(file) is not None or not disk.pays(until):
                return None
            last, was_there = self._tried.get(file.sha256, (-1, False))
            if until <= last:
                if was_there:
                    disk.overflows(until)
                return None
            data = disk.fill(file.sha256, file.bytes, lambda: self._fetch(file), until)
            self._remember(file, until, self._local(file) is not None)
            return data

    def _remember(self, file: FileTable, until: int, is_there: bool) -> None:
        with self._lock:
            last, _ = self._tried.pop(file.sha256, (-1, False))
            self._tried[file.sha256] = max(until, last), is_there
            if len(self._tried) > REMEMBERED:
                self._tried.popitem(last=False)

    def _local(self, file: FileTable) -> Path | None:
        if self.closed.is_set():
            raise CancelledError
        return None if self._disk is None else self._disk.path(file.sha256)

    def _fetch(self, file: FileTable) -> bytes:
        self._count(requests=1)
        path = f"{self._root}/{file.file}"
        # no more than that, as it may have grown; a folder in its place is empty, so: damaged
        (data,) = read_ranges(self._filesystem, path, [(0, file.bytes)])
        self._count(read=len(data))
        return data

    def _count(self, *, requests: int = 0, read: int = 0) -> None:
        with self._lock:
            if requests and self.closed.is_set():
                raise CancelledError
            self.opens += requests
            self.bytes_read += read


def _read_local(path: Path, spans: list[tuple[int, int]]) -> list[bytes]:
    blocks = []
    with path.open("rb") as file:
        for begin, end in spans:
            file.seek(begin)
            blocks.append(file.read(end - begin))
    return blocks
