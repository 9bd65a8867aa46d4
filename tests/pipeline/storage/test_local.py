"""Reading pieces of a file straight into buffers."""

from __future__ import annotations

import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.storage import local as module
from pipeline.storage.files import (
    StorageError,
    open_url,
    read_at_most,
    read_bytes,
    read_directly,
    read_ranges,
)
from pipeline.storage.local import scatter

Pieces = list[tuple[int, list[bytearray]]]


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    data = np.random.default_rng(0).bytes(40_000)
    (tmp_path / "file").write_bytes(data)
    return data


def make_pieces(rng: random.Random, size: int) -> Pieces:
    """Near each other and far, overlapping, empty, and beyond the end."""
    pieces = []
    for _ in range(rng.randint(1, 30)):
        buffers = [bytearray(rng.choice([0, 1, 7, 100, 5000])) for _ in range(rng.randint(1, 3))]
        pieces.append((rng.randint(0, size + 100), buffers))
    return pieces


def read_into(path: str, pieces: Pieces, *, ahead: bool = False) -> list[int] | None:
    filesystem, path = open_url(path, what="--store")
    return read_directly(filesystem, path, lambda d: scatter(d, pieces), ahead=ahead)


def check(pieces: Pieces, counts: list[int] | None, data: bytes) -> None:
    assert counts is not None
    for (offset, buffers), count in zip(pieces, counts, strict=True):
        expected = data[offset : offset + sum(map(len, buffers))]
        assert count == len(expected)
        assert b"".join(map(bytes, buffers))[:count] == expected


@pytest.mark.parametrize("seed", range(30))
def test_each_piece_gets_its_bytes(tmp_path: Path, data: bytes, seed: int) -> None:
    rng = random.Random(seed)
    pieces = make_pieces(rng, len(data))
    check(pieces, read_into(str(tmp_path / "file"), pieces, ahead=bool(seed % 2)), data)


@pytest.mark.parametrize("most", [1, 1000, 4999])
def test_what_the_system_gives_in_parts_is_asked_for_again(
    tmp_path: Path, data: bytes, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.preadv

    def short(descriptor: int, buffers: list[bytearray], offset: int) -> int:
        part = bytearray(min(most, sum(map(len, buffers))))
        got = plain(descriptor, [part], offset)
        left = bytes(part[:got])
        for buffer in buffers:
            memoryview(buffer)[: len(left)] = left[: len(buffer)]
            left = left[len(buffer) :]
        return got

    monkeypatch.setattr(module.os, "preadv", short)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    # small ones, as each call gives a byte only
    pieces = [(o, [bytearray(n), bytearray(3)]) for o, n in ((0, 9), (20, 0), (30, 5), (39_998, 9))]
    try:
        check(pieces, scatter(descriptor, pieces), data)
    finally:
        os.close(descriptor)


def test_neighbours_are_one_call(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain = os.preadv

    def counting(descriptor: int, buffers: list[bytearray], offset: int) -> int:
        calls.append(offset)
        return plain(descriptor, buffers, offset)

    monkeypatch.setattr(module.os, "preadv", counting)
    path = str(tmp_path / "file")
    pieces = [(offset, [bytearray(100)]) for offset in (20_000, 500, 0, 19_000)]
    check(pieces, read_into(path, pieces), data)
    assert calls == [0, 19_000]
    many = [(offset, [bytearray(1)]) for offset in range(0, 3000, 2)]
    check(many, read_into(path, many), data)


def test_what_is_no_file(tmp_path: Path) -> None:
    """A pipe does not hang and a device does not answer without end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        filesystem, path = open_url(str(tmp_path / name), what="--store")
        assert read_into(path, [(0, [bytearray(5)])]) is None
        assert read_ranges(filesystem, path, [(0, 5), (7, 1 << 50)]) == [b"", b""]
        assert read_at_most(filesystem, path, 5) == b""
        with pytest.raises(StorageError, match="a pipe or a device, not a file"):
            read_bytes(filesystem, path)
    filesystem, path = open_url(str(tmp_path / "none"), what="--store")
    with pytest.raises(FileNotFoundError):
        read_into(path, [(0, [bytearray(5)])])
    with pytest.raises(FileNotFoundError):
        read_ranges(filesystem, path, [(0, 5)])
    filesystem, path = open_url(str(tmp_path), what="--store")
    assert read_ranges(filesystem, path, [(0, 5)]) == [b""]
    for read in (partial(read_at_most, size=5), read_bytes):
        with pytest.raises(StorageError, match=r"[Ii]s a (folder|directory)"):
            read(filesystem, path)


def test_more_than_a_file_has_takes_up_no_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123")
    filesystem, path = open_url(str(tmp_path / "file"), what="--store")
    assert read_ranges(filesystem, path, [(1, 1 << 60), (9, 1 << 60)]) == [b"123", b""]
