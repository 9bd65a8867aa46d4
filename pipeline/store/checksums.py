"""Checksums of stored bytes.

New stores have CRC-32C, which processors compute at seven times the speed of zlib's CRC-32 (28
against 4 GB/s on an Intel Xeon).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np

from schemas.store import Checksum

Buffer = bytes | bytearray | memoryview

CHECKSUMS: dict[Checksum, Callable[[int, Any], int]] = {
    "crc32": lambda start, data: zlib.crc32(data, start),
    "crc32c": google_crc32c.extend,
}
"""(checksum of the bytes before, or 0; bytes or a read-only array of them) -> checksum."""


def extend(kind: Checksum, start: int, data: Buffer) -> int:
    """The same for any buffer: the package of CRC-32C refuses those that can be written to."""
    if not isinstance(data, bytes):
        data = np.frombuffer(memoryview(data).toreadonly(), np.uint8)  # type: ignore[assignment]
    return CHECKSUMS[kind](start, data)
