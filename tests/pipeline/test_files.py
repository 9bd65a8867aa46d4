"""URLs, credentials and atomic writes."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.files import (
    absolute_url,
    open_url,
    publish,
    sha256_of_arrays,
    without_credentials,
    write_atomic,
)
from schemas.errors import UserError
from tests.helpers import all_files


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:hunter2@bucket/a/b", "s3://bucket/a/b"),
        ("s3://key:hunt@er2@bucket/a/b", "s3://bucket/a/b"),
        ("https://host/a?token=hunter2&x=1", "https://host/a"),
        ("simplecache::s3://key:hunter2@bucket/a", "simplecache::s3://bucket/a"),
        ("cannot reach http://k:hunter2@h/a?t=hunter2\nat all", "cannot reach http://h/a\nat all"),
        ("/data/what?/a@b", "/data/what?/a@b"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
    ],
)
def test_credentials_are_never_shown(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


def test_unknown_protocol_is_one_line_without_secrets() -> None:
    with pytest.raises(UserError, match="--store 'nosuch://host/x'") as error:
        open_url("nosuch://me:hunter2@host/x", what="--store")
    assert "hunter2" not in str(error.value)


def test_local_paths_become_absolute_and_urls_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute_url("~/x") == "/home/someone/x"
    assert absolute_url("a/../b") == os.path.join(os.getcwd(), "b")
    assert absolute_url("s3://bucket/~/a") == "s3://bucket/~/a"


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_atomic_write_replaces_the_whole_file(tmp_path: Path, protocol: str) -> None:
    filesystem, path = open_url(f"{protocol}://{tmp_path}/deep/er/file", what="--x")
    for data in (b"a longer text", b"short"):
        write_atomic(filesystem, path, data)
        assert filesystem.cat_file(path) == data
    if protocol == "file":
        assert all_files(tmp_path) == {"deep/er/file": b"short"}


def test_a_write_that_dies_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem, path = open_url(f"{tmp_path}/file", what="--x")
    write_atomic(filesystem, path, b"old")

    def die(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(OSError, match="no space"):
        write_atomic(filesystem, path, b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_published_files_move(tmp_path: Path, protocol: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "local").write_bytes(b"data")
    target = f"{tmp_path}/there/final"
    publish(fsspec.filesystem(protocol), tmp_path / "local", target)
    assert not (tmp_path / "local").exists()
    assert fsspec.filesystem(protocol).cat_file(target) == b"data"


def test_digest_of_arrays_sees_names_shapes_dtypes_and_values() -> None:
    x = np.arange(4, dtype=np.int32)
    variants = [
        [("a", x)],
        [("b", x)],
        [("a", x.reshape(2, 2))],
        [("a", x.view(np.uint32))],
        [("a", x + 1)],
        [("a", x[:2]), ("a", x[2:])],
    ]
    assert len({sha256_of_arrays(items) for items in variants}) == len(variants)
    assert sha256_of_arrays([("a", x)]) == sha256_of_arrays([("a", x.copy())])
