"""Blocks of arrays in memory that a small file cannot inflate."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pipeline.storage import npz
from pipeline.storage.npz import Archive, fitting_rows, npy_header, read_npy_header
from schemas.errors import UserError


def test_a_block_has_no_more_rows_than_memory_is_meant_to_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "MAX_BLOCK", 1000)
    rows = np.random.default_rng(0).integers(0, 256, (11, 20, 7), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", rows=rows)
    blocks = list(Archive(str(tmp_path / "a.npz"), "--samples").blocks("rows", 64))
    assert [len(block) for block in blocks] == [7, 4]
    np.testing.assert_array_equal(np.concatenate(blocks), rows)
    assert fitting_rows(64, 2000) == 1
    assert fitting_rows(64, 0) == 64


def test_an_array_is_in_memory_once(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", zeros=np.zeros((8, 1 << 22), np.uint8))
    tracemalloc.start()
    try:
        (block,) = Archive(str(tmp_path / "a.npz"), "--samples").blocks("zeros", 8)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert block.flags.writeable
    assert peak < 1.4 * block.nbytes


def test_changed_bytes_are_damage(tmp_path: Path) -> None:
    place = tmp_path / "a.npz"
    np.savez(place, zeros=np.zeros(100_000, np.uint8))
    data = bytearray(place.read_bytes())
    data[60_000] ^= 1  # which zip's own checksum finds at the end
    place.write_bytes(data)
    with pytest.raises(UserError, match=r"--samples '.*a.npz' is damaged"):
        Archive(str(place), "--samples").array("zeros", 1 << 20)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"PK\x03\x04 something", "ValueError"),
        (b"\x93NUMPY\x01\x00\x76\x00{'descr'", "ValueError"),
        (b"\x93NUMPY\x03\x00\x76\x00\x00\x00", "KeyError"),
        (b"\x93NUMPY\x02\x00\x00\x00\x00\x80" + b" " * 99, "ValueError"),
        (b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000, "Error"),
    ],
    ids=["zip", "cut short", "version 3", "2 GiB", "nested"],
)
def test_other_headers_are_refused(header: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_npy_header(io.BytesIO(header))


def test_a_header_is_read_back() -> None:
    for dtype in ("|u1", "<f4"):
        header = npy_header((3, 2), dtype)
        file = io.BytesIO(header + b"numbers")
        assert read_npy_header(file) == ((3, 2), np.dtype(dtype), False, len(header))
        assert file.read() == b"numbers"
