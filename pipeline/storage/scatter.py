"""From an open file to many buffers with few calls of the system."""

from __future__ import annotations

import os
from collections.abc import Sequence

Buffer = bytearray | memoryview

GAP = 4096
"""Bytes between two pieces that are read and thrown away rather than asked for around: a tar's
headers cost less than asking twice. (zarr orders the chunks of a shard as it likes: a file's order
is not that of its rows.)"""
MOST_BUFFERS = 512
"""Of one call; the system takes 1024."""

_nowhere = memoryview(bytearray(GAP))  # written to by all threads, read by none


def scatter(descriptor: int, pieces: Sequence[tuple[int, Sequence[Buffer]]]) -> list[int]:
    """Fill the buffers of each piece from its offset on; the bytes that there were of each."""
    counts = [0] * len(pieces)
    order = sorted(range(len(pieces)), key=lambda number: pieces[number][0])
    begin = end = 0
    buffers: list[Buffer] = []
    members: list[tuple[int, int, int]] = []  # piece, where it begins, its bytes
    for number in order:
        offset, wanted = pieces[number]
        size = sum(map(len, wanted))
        gap = offset - end
        if members and (not 0 <= gap <= GAP or len(buffers) + len(wanted) >= MOST_BUFFERS):
            _read(descriptor, begin, buffers, members, counts)
            buffers, members = [], []
        if not members:
            begin = offset
        elif gap:
            buffers.append(_nowhere[:gap])
        buffers.extend(wanted)
        members.append((number, offset, size))
        end = offset + size
    if members:
        _read(descriptor, begin, buffers, members, counts)
    return counts


def _read(
    descriptor: int,
    begin: int,
    buffers: list[Buffer],
    members: list[tuple[int, int, int]],
    counts: list[int],
) -> None:
    position, end = begin, max(offset + size for _, offset, size in members)
    while position < end:
        got = os.preadv(descriptor, buffers, position)
        if not got:
            break
        position += got
        if position < end:
            buffers = _behind(buffers, got)
    for number, offset, size in members:
        counts[number] = max(0, min(size, position - offset))


def _behind(buffers: list[Buffer], count: int) -> list[Buffer]:
    """What is left of them behind their first ``count`` bytes."""
    for number, buffer in enumerate(buffers):
        if count < len(buffer):
            return [memoryview(buffer)[count:], *buffers[number + 1 :]]
        count -= len(buffer)
    return []
