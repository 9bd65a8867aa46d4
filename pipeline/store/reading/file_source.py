"""Bytes of a stream's files, from memory, a local disk cache or storage."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import NamedTuple, TypeVar

import fsspec

from pipeline.storage.files import is_local, read_directly, read_ranges
from pipeline.storage.local import GAP, LocalFile
from pipeline.store.reading.disk_cache import DiskCache
from pipeline.store.reading.memory_cache import MemoryBudget, SharedCache
from pipeline.store.reading.shard_index import FileTable

T = TypeVar("T")

REQUEST_COST_BYTES = 256 << 10
"""Cost of one more request, in bytes that could have been read instead: 3 ms at 80 MB/s, because
several requests run at a time."""

MAX_OPEN_FILES = 64
"""Local files that stay open during their window; others are opened for each batch."""

MAX_TRACKED_FILES = 1 << 14
"""Files whose read-ahead or disk cache attempt is remembered; current windows hold fewer."""

FetchWhole = Callable[[int, int], bool]
"""(bytes of a file, its samples) -> True to fetch it whole and cache it until its window ends,
instead of reading the ranges of the requested rows."""


def whole_up_to(limit: int) -> FetchWhole:
    """Fetch files of at most ``limit`` bytes whole."""
    return lambda size, samples: size <= limit


def whole_if_cheaper(world_size: int) -> FetchWhole:
    """Fetch a file whole if that costs less than reading this rank's share of it row by row.

    Every rank needs about one in ``world_size`` samples of each shard, one request each. A rank
    that needs all or most of a file, or small samples, fetches the file whole, once per window.
    """

    def fetch_whole(size: int, samples: int) -> bool:
        rows = -(-samples // world_size)
        return size + REQUEST_COST_BYTES <= rows * (size / max(1, samples) + REQUEST_COST_BYTES)

    return fetch_whole


class RangeData(NamedTuple):
    """Bytes of the requested ranges; shorter where the file ends earlier."""

    pieces: list[memoryview]
    from_disk: bool
    """Read from the local disk cache, whose files may have been damaged since."""


class FileSource:
    """The files of one stream. Safe to use from several threads.

    ``opens`` and ``bytes_read`` count requests to storage and bytes received. Methods raise
    ``FileNotFoundError`` when storage lacks a file, and ``CancelledError`` once the source is
    closed. Their ``expires_at`` is the sample position of the run from which on the file is not
    needed any more.
    """

    def __init__(
        self,
        filesystem: fsspec.AbstractFileSystem,
        root: str,
        *,
        fetch_whole: FetchWhole,
        budget: MemoryBudget | None = None,
        disk: DiskCache | None = None,
    ) -> None:
        self.opens = 0
        self.bytes_read = 0
        self.cache: SharedCache[tuple[bytes, bool]] = SharedCache(budget)
        """Whole files by path, and whether they came from the disk."""
        self._open_files: SharedCache[LocalFile] = SharedCache(MemoryBudget(MAX_OPEN_FILES))
        self._filesystem = filesystem
        self._root = root
        self._fetch_whole = fetch_whole
        self._disk = disk
        self._disk_attempts: OrderedDict[str, tuple[int, bool]] = OrderedDict()
        """Files to cache on disk, by hash: expiry of the last attempt, and whether it succeeded."""
        self._read_ahead: OrderedDict[str, int] = OrderedDict()
        """Expiry of the files that the system was asked to read ahead, by path."""
        self.closed = threading.Event()
        """Set by ``close``, or before it so that running reads give up at their next attempt."""
        self._lock = threading.Lock()
        self._filling = threading.Lock()

    def read(
        self,
        file: FileTable,
        ranges: Sequence[tuple[int, int]],
        expires_at: int,
        *,
        refetch: bool = False,
    ) -> RangeData:
        """The bytes of each (offset, size). ``refetch`` deletes the file from the caches first,
        because its cached bytes are damaged."""
        if refetch:
            self.cache.discard(file.file)
            if self._disk is not None:
                self._disk.discard(file.sha256)
                self._disk_attempts.pop(file.sha256, None)
        if self._fetch_whole(file.bytes, file.samples) or file.file in self.cache:
            loaded = self.cache.get(
                file.file,
                lambda: self._load_file(file, expires_at, refetch),
                size=file.bytes,
                expires_at=expires_at,
            )
            if loaded is not None:
                data, from_disk = loaded
                view = memoryview(data)
                return RangeData([view[start : start + size] for start, size in ranges], from_disk)
        return self._read_ranges(file, ranges, expires_at, refetch)

    @property
    def is_direct(self) -> bool:
        """True if files are local and read by ``read_directly``: the system's page cache of a
        local file is better than a copy in memory."""
        return self._disk is None and is_local(self._filesystem)

    def read_directly(
        self, file: FileTable, read: Callable[[int], tuple[T, int]], expires_at: int
    ) -> T | None:
        """Call ``read`` with the descriptor of a local file; it returns a result and the bytes it
        read. Returns the result, or None when the file is not a regular file."""
        self._raise_if_closed()
        read_ahead = self._read_ahead.get(file.file) != expires_at  # once per window
        if read_ahead:
            self._read_ahead[file.file] = expires_at
            if len(self._read_ahead) > MAX_TRACKED_FILES:
                self._read_ahead.popitem(last=False)
            read_ahead = self._fetch_whole(file.bytes, file.samples)

        def open_file(path: str, ahead: bool) -> LocalFile:
            def load() -> LocalFile:
                self._count(requests=1)
                return LocalFile(path, ahead=ahead)

            if not expires_at:
                return load()
            held = self._open_files.get(file.file, load, size=1, expires_at=expires_at)
            return held or load()

        def read_or_reopen(descriptor: int) -> tuple[T, int]:
            try:
                return read(descriptor)
            except OSError:  # such as a stale handle: the next attempt opens the file again
                self._open_files.discard(file.file)
                raise

        path = f"{self._root}/{file.file}"
        result = read_directly(
            self._filesystem, path, read_or_reopen, ahead=read_ahead, open_file=open_file
        )
        if result is None:
            return None
        self._count(read=result[1])
        return result[0]

    def expire(self, position: int) -> None:
        """Free files that are needed only before ``position`` of the run."""
        self.cache.expire(position)
        self._open_files.expire(position)

    def close(self) -> None:
        """Free cached files and send no more requests to storage."""
        self.closed.set()
        self.cache.clear()
        self._open_files.clear()

    def _load_file(self, file: FileTable, expires_at: int, refetch: bool) -> tuple[bytes, bool]:
        """A whole file, and whether it came from the disk cache."""
        local = None if refetch else self._local_path(file)
        if local is not None:
            try:
                return local.read_bytes(), True
            except OSError:  # evicted by another worker
                pass
        if self._disk is None:
            return self._fetch(file), False
        data = self._disk.fill(file.sha256, file.bytes, lambda: self._fetch(file), expires_at)
        if data is None:  # another worker has just cached it
            return self._load_file(file, expires_at, refetch=False)
        return data, False

    def _read_ranges(
        self, file: FileTable, ranges: Sequence[tuple[int, int]], expires_at: int, refetch: bool
    ) -> RangeData:
        """Ranges, read as spans: neighbouring ranges are merged into one span."""
        spans: list[list[int]] = []
        span_of = [0] * len(ranges)
        for number in sorted(range(len(ranges)), key=ranges.__getitem__):
            start, size = ranges[number]
            if spans and 0 <= start - spans[-1][1] <= GAP:
                spans[-1][1] = start + size
            else:
                spans.append([start, start + size])
            span_of[number] = len(spans) - 1
        blocks, from_disk = self._read_spans(
            file, [(begin, end) for begin, end in spans], expires_at, refetch
        )
        views = [memoryview(block) for block in blocks]
        pieces = [
            views[span][start - spans[span][0] :][:size]
            for span, (start, size) in zip(span_of, ranges, strict=True)
        ]
        return RangeData(pieces, from_disk)

    def _read_spans(
        self, file: FileTable, spans: list[tuple[int, int]], expires_at: int, refetch: bool
    ) -> tuple[list[bytes], bool]:
        """Bytes of each (begin, end), and whether they came from the disk cache."""
        if self._disk is not None and not refetch:
            data = self._cache_on_disk(file, expires_at)
            if data is not None:
                return [data[begin:end] for begin, end in spans], False
            local = self._local_path(file)
            if local is not None:
                try:
                    return _read_local(local, spans), True
                except OSError:  # evicted by another worker
                    pass
        self._count(requests=1)
        blocks = read_ranges(self._filesystem, f"{self._root}/{file.file}", spans)
        self._count(read=sum(len(block) for block in blocks))
        return blocks, False

    def _cache_on_disk(self, file: FileTable, expires_at: int) -> bytes | None:
        """Fetch a file whole into the disk cache, for later epochs and for other workers of this
        node, though only ranges are needed now. Returns its bytes if it was fetched.

        One file at a time, because it passes through memory outside the budget; at most once per
        window, because a file that was evicted by then would be evicted again.
        """
        disk = self._disk
        if disk is None:
            return None
        if file.bytes > disk.limit:
            disk.report_overflow(-1)  # smaller files may fit
            return None
        if self._local_path(file) is not None:
            self._record_attempt(file, expires_at, True)
            return None
        with self._filling:
            if self._local_path(file) is not None or not disk.is_useful(expires_at):
                return None
            last_expiry, succeeded = self._disk_attempts.get(file.sha256, (-1, False))
            if expires_at <= last_expiry:
                if succeeded:
                    disk.report_overflow(expires_at)
                return None
            data = disk.fill(file.sha256, file.bytes, lambda: self._fetch(file), expires_at)
            self._record_attempt(file, expires_at, self._local_path(file) is not None)
            return data

    def _record_attempt(self, file: FileTable, expires_at: int, succeeded: bool) -> None:
        with self._lock:
            last_expiry, _ = self._disk_attempts.pop(file.sha256, (-1, False))
            self._disk_attempts[file.sha256] = max(expires_at, last_expiry), succeeded
            if len(self._disk_attempts) > MAX_TRACKED_FILES:
                self._disk_attempts.popitem(last=False)

    def _local_path(self, file: FileTable) -> Path | None:
        """Path of the file in the disk cache; None if it is not there."""
        self._raise_if_closed()
        return None if self._disk is None else self._disk.path(file.sha256)

    def _fetch(self, file: FileTable) -> bytes:
        self._count(requests=1)
        path = f"{self._root}/{file.file}"
        # At most the committed bytes, because the file may have grown. A folder in its place reads
        # as empty, which is reported as damage.
        (data,) = read_ranges(self._filesystem, path, [(0, file.bytes)])
        self._count(read=len(data))
        return data

    def _raise_if_closed(self) -> None:
        if self.closed.is_set():
            raise CancelledError

    def _count(self, *, requests: int = 0, read: int = 0) -> None:
        with self._lock:
            if requests:
                self._raise_if_closed()
            self.opens += requests
            self.bytes_read += read


def _read_local(path: Path, spans: list[tuple[int, int]]) -> list[bytes]:
    blocks = []
    with path.open("rb") as file:
        for begin, end in spans:
            file.seek(begin)
            blocks.append(file.read(end - begin))
    return blocks
