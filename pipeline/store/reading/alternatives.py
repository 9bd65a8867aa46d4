"""Columns of one shape and codec of which a visit reads one, such as captions of an image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.storage.local import GAP
from pipeline.store.arrays import Allocate, ArrayReader, allocate, decompress
from pipeline.store.checksums import CHECKSUMS
from pipeline.store.codecs import column_arrays
from pipeline.store.errors import DamagedShardError
from pipeline.store.reading.file_source import FileSource
from pipeline.store.reading.row_request import RowRequest
from pipeline.store.reading.shard_index import FileTable, ShardTable
from pipeline.store.reading.stream_reader import StreamReader
from pipeline.store.store import Store


class AlternativesReader(StreamReader):
    """Reads K ``columns`` as one column ``name`` of K times as many rows: row r * K + k is column k
    of sample r. Rows of different columns are so read by one request.

    ``shared`` are columns of which every such row has the sample's.
    """

    def __init__(
        self,
        store: Store,
        stream: str,
        columns: Sequence[str],
        name: str,
        *,
        shared: Sequence[str] = (),
        verify: bool = True,
        whole_file_limit: int = 8 << 20,
        source: FileSource | None = None,
        allocate: Allocate = allocate,
    ) -> None:
        super().__init__(
            store,
            stream,
            columns=[*columns, *shared],
            verify=verify,
            whole_file_limit=whole_file_limit,
            source=source,
            allocate=allocate,
        )
        self.columns = columns
        held = store.manifest.streams[stream].columns
        self._own = column_arrays(name, held[columns[0]])
        self._stored = [column_arrays(column, held[column]) for column in columns]
        self._describe({name: held[columns[0]]} | {column: held[column] for column in shared})
        self._rows_per_shard = len(columns) * store.manifest.shard_size
        self._fixed = True

    def _read_table(self, shard: int) -> ShardTable:
        table = super()._read_table(shard)
        files = tuple(self._merged(file) for file in table.files)
        return ShardTable(table.samples * len(self.columns), files)

    def _merged(self, file: FileTable) -> FileTable:
        """The table of rows r * K + k of a file that holds arrays of all columns, or of the only
        one."""
        at = {name: number for number, name in enumerate(file.names)}
        count = len(self.columns)
        taken = [number for number, name in enumerate(self._stored[0]) if name in at]
        of_row = np.array(  # (K, A): of each row's arrays, the column of the table
            [[at[names[number]] for number in taken] for names in self._stored], np.intp
        )
        own = {name for names in self._stored for name in names}
        shared = [name for name in file.names if name not in own]
        of_row = np.hstack([of_row, np.tile([at[name] for name in shared], (count, 1)).astype(int)])

        def rows(values: np.ndarray) -> np.ndarray:
            return values[:, of_row].reshape(-1, of_row.shape[1])

        return file._replace(
            names=(*(self._own[number] for number in taken), *shared),
            offsets=rows(file.offsets),
            sizes=rows(file.sizes),
            crc32=rows(file.crc32),
            alternatives=count,
        )

    def _damaged(self, shard: int, row: int, name: str, reason: str) -> DamagedShardError:
        sample, number = divmod(row, len(self.columns))
        if name in self._own:
            name = self._stored[number][self._own.index(name)]
        return super()._damaged(shard, sample, name, reason)

    def _read_arrays(self, request: RowRequest) -> None:
        """Arrays of rows that lie together by one system call a row. The general path reads rows
        that do not, or that fail a check, again, and names the damaged array."""
        rows = _PackedRows(request, self._arrays)
        if not rows.are_together or not self.source.read_directly(
            request.file, rows.read, request.expires_at
        ):
            super()._read_arrays(request)


class _PackedRows:
    """Reads the rows of a request, with compressed arrays among them, by way of one buffer."""

    def __init__(self, request: RowRequest, readers: dict[str, ArrayReader]) -> None:
        self._request = request
        file, rows = request.file, request.rows
        offsets, self._sizes = file.offsets[rows], file.sizes[rows]
        self._begins = offsets.min(1)
        self._spans = (offsets + self._sizes).max(1) - self._begins
        self._places = offsets - self._begins[:, None]
        self._readers = [readers[name] for name in file.names]
        gaps = self._spans - self._sizes.sum(1)
        self.are_together = bool((gaps <= GAP * len(file.names)).all()) and not any(
            reader.is_text or reader.part.trimmed for reader in self._readers
        )

    def read(self, descriptor: int) -> tuple[bool, int]:
        """True if all rows are as the manifest and the checksums to verify say, and the payload
        bytes read. On failure the contents of the batch at the request's places are undefined."""
        request = self._request
        file, check = request.file, request.check
        checksum = CHECKSUMS[file.checksum]
        checked = [False] * len(request.rows) if check is None else list(check)
        expected = file.crc32[request.rows].tolist()
        stored = np.empty(int(self._spans.max()), np.uint8)
        buffer, data = stored.data, stored.view()
        data.flags.writeable = False  # as the package of CRC-32C requires
        arrays = [_Target(reader, request.out[name]) for reader, name in self._named()]
        begins, spans = self._begins.tolist(), self._spans.tolist()
        starts, sizes = self._places.tolist(), self._sizes.tolist()
        for number, place in enumerate(request.places.tolist()):
            span = spans[number]
            if os.preadv(descriptor, [buffer[:span]], begins[number]) != span:
                return False, 0
            for column, array in enumerate(arrays):
                start = starts[number][column]
                piece = data[start : start + sizes[number][column]]
                if checked[number] and checksum(0, piece) != expected[number][column]:
                    return False, 0
                if not array.fill(piece, place):
                    return False, 0
        return True, int(self._sizes.sum())

    def _named(self) -> list[tuple[ArrayReader, str]]:
        return list(zip(self._readers, self._request.file.names, strict=True))


class _Target:
    """One array of a batch, and a buffer for its decompressed bytes with their header."""

    def __init__(self, reader: ArrayReader, out: np.ndarray) -> None:
        self._part = reader.part
        self._header = reader.header
        self._rows = out.reshape(len(out), -1).view(np.uint8)
        self._size = len(self._header) + self._part.nbytes
        self._compressed = self._part.lossless != "none"
        self._plain = np.empty(self._size if self._compressed else 0, np.uint8)

    def fill(self, piece: np.ndarray[Any, np.dtype[np.uint8]], place: int) -> bool:
        """Write stored bytes into the row at ``place``; False where they are not its array's."""
        if self._compressed:
            try:
                decompress(self._part, piece.data, self._size, self._plain)
            except ValueError:
                return False
            piece = self._plain
        header = len(self._header)
        if len(piece) != self._size or piece[:header].tobytes() != self._header:
            return False
        self._rows[place] = piece[header:]
        return True
