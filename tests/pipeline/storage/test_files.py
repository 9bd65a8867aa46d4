"""URLs, credentials, atomic writes and what is tried again; on real S3, see ``test_s3.py``."""

from __future__ import annotations

import errno
import os
import random
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import numpy as np
import pytest
from botocore import exceptions as boto
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.errors import translate_boto_error

from pipeline.datasets.folder import list_files
from pipeline.hashing import sha256_of_arrays
from pipeline.storage import retry
from pipeline.storage.files import (
    RETRY_VARIABLE,
    TEMPORARY,
    StorageError,
    absolute_url,
    exists,
    file_size,
    list_folder,
    list_tree,
    open_url,
    publish,
    read_bytes,
    read_ranges,
    redact,
    remove,
    write_atomic,
)
from pipeline.store import Store
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
        ("http://host:8333/a@b", "http://host:8333/a@b"),
        ("s3://key:hunt/er2@bucket/a", "s3://bucket/a"),
        ('bad bucket name "key:hunter2@bucket"', 'bad bucket name "bucket"'),
        ('no answer from "http://h:1/b?list=2&t=hunter2": why', 'no answer from "http://h:1/b'),
        ("(see http://h:1/b?t=hunter2) again", "(see http://h:1/b) again"),
        ("AWS_SECRET_ACCESS_KEY=hunter2/x+y= is wrong", "AWS_SECRET_ACCESS_KEY=*** is wrong"),
        (
            "{'aws_secret_access_key': 'hunter2 x', 'n': 1}",
            "{'aws_secret_access_key': ***, 'n': 1}",
        ),
        ('{"SessionToken": "hunter2"}', '{"SessionToken": ***}'),
        ("<AWSAccessKeyId>hunter2</AWSAccessKeyId>", "<AWSAccessKeyId>***</AWSAccessKeyId>"),
        ("X-Amz-Security-Token: hunter2", "X-Amz-Security-Token: ***"),
        ("key AKIAHUNTER2HUNTER22 is unknown", "key *** is unknown"),
        ("Authorization: AWS4-HMAC-SHA256 Credential=hunter2/x", "Authorization: ***"),
        ("256 tokens: too many", "256 tokens: too many"),
    ],
)
def test_credentials_are_never_shown(url: str, shown: str) -> None:
    assert redact(url).startswith(shown)
    assert "hunter2" not in redact(url)
    if "list=" not in url:  # a quote with more text behind it goes with the query
        assert redact(url) == shown


def test_credentials_of_the_environment_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2/and+more")
    monkeypatch.setenv("GITHUB_TOKEN", "hunter2/and+more-of-it")
    assert redact("a hunter2/and+more-of-it, hunter2/and+more.") == "a ***, ***."


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

    monkeypatch.setattr(os, "fsync", _disk_is_full)
    with pytest.raises(StorageError, match="No space left on device; free space there"):
        write_atomic(filesystem, path, b"new")
    with pytest.raises(StorageError, match="No space left"):
        write_atomic(filesystem, f"{path}-2", b"new")
    assert all_files(tmp_path) == {"file": b"old"}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux's /proc is used")
def test_a_folder_that_cannot_be_made_is_no_missing_file(tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("file")
    (tmp_path / "local").write_bytes(b"data")
    expected = r"^cannot write '/proc/none/file': .*its folder cannot be made"
    with pytest.raises(StorageError, match=expected):
        write_atomic(filesystem, "/proc/none/file", b"data")
    with pytest.raises(StorageError, match=expected):
        publish(filesystem, tmp_path / "local", "/proc/none/file")
    assert (tmp_path / "local").exists()


def test_publishing_from_another_disk_is_atomic_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local").write_bytes(b"data")
    filesystem, path = open_url(f"{tmp_path}/there/final", what="--x")
    replace = os.replace

    def other_disk(source: Path, target: Path) -> None:
        if not Path(source).name.startswith(TEMPORARY):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, target)

    monkeypatch.setattr(os, "replace", other_disk)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", _disk_is_full)
        with pytest.raises(StorageError, match="No space left"):
            publish(filesystem, tmp_path / "local", path)
    assert all_files(tmp_path) == {"local": b"data"}
    publish(filesystem, tmp_path / "local", path)
    assert all_files(tmp_path) == {"there/final": b"data"}


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_published_files_move(tmp_path: Path, protocol: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "local").write_bytes(b"data")
    target = f"{tmp_path}/there/final"
    publish(fsspec.filesystem(protocol), tmp_path / "local", target)
    assert not (tmp_path / "local").exists()
    assert fsspec.filesystem(protocol).cat_file(target) == b"data"


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_reading_and_listing(tmp_path: Path, protocol: str) -> None:
    filesystem, root = open_url(f"{protocol}://{tmp_path}/root", what="--x")
    data = bytes(range(200))
    assert list_folder(filesystem, root) == []
    assert list_tree(filesystem, root) == {}
    write_atomic(filesystem, f"{root}/b/1", data)
    write_atomic(filesystem, f"{root}/a", b"")
    assert read_bytes(filesystem, f"{root}/b/1") == data
    ranges = [(7, 9), (5, 5), (100, 400), (300, 400), (0, 200)]
    assert read_ranges(filesystem, f"{root}/b/1", ranges) == [data[b:e] for b, e in ranges]
    assert list_folder(filesystem, root) == [f"{root}/a", f"{root}/b"]
    assert list_folder(filesystem, f"{root}/a") == []
    assert list_tree(filesystem, root) == {f"{root}/a": 0, f"{root}/b/1": 200}
    assert file_size(filesystem, f"{root}/b/1") == 200
    assert exists(filesystem, f"{root}/b")
    assert not exists(filesystem, f"{root}/a/below-a-file")
    with pytest.raises(StorageError, match="is a folder"):
        file_size(filesystem, f"{root}/b")
    remove(filesystem, f"{root}/a")
    remove(filesystem, f"{root}/a")
    assert not exists(filesystem, f"{root}/a")
    with pytest.raises(FileNotFoundError):
        read_bytes(filesystem, f"{root}/a")


def test_linked_folders_are_listed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "other-disk").mkdir()
    (tmp_path / "other-disk" / "file").write_bytes(b"data")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "other-disk")
    (tmp_path / "other-disk" / "circle").symlink_to(tmp_path / "root")
    filesystem, root = open_url(f"{tmp_path}/root", what="--x")
    assert list_tree(filesystem, root) == {f"{root}/linked/file": 4}


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


def _disk_is_full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Flaky(MemoryFileSystem):
    """Raises what it was given, one error a request, before it does what it is asked."""

    cachable = False
    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012 - MemoryFileSystem's, which it shares with its kind

    def __init__(self, errors: list[Exception]) -> None:
        super().__init__()
        self.store, self.pseudo_dirs = {}, [""]
        self.errors = errors
        self.requests = 0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return self._first_raise(found) if name in FLAKY else found

    def _first_raise(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def flaky(*arguments: Any, **options: Any) -> Any:
            self.requests += 1
            if self.errors:
                raise self.errors.pop(0)
            return call(*arguments, **options)

        return flaky


FLAKY = {"cat_file", "pipe_file", "put_file", "info", "ls", "find", "rm_file"}


def answered(code: str, status: int) -> Exception:
    """The error of a service that answered, as s3fs raises it."""
    error = {"Error": {"Code": code, "Message": f"said {code}"}}
    response = {**error, "ResponseMetadata": {"HTTPStatusCode": status}}
    translated: Exception = translate_boto_error(boto.ClientError(response, "GetObject"))
    return translated


def truncated() -> Exception:
    error = aiohttp.ClientPayloadError("Response payload is not completed")
    error.__cause__ = aiohttp.http_exceptions.ContentLengthError("Not enough data")
    return error


class StatusError(Exception):
    """As Google's and Azure's packages raise."""

    def __init__(self, code: int) -> None:
        super().__init__(f"status {code}")
        self.code = code


TRANSIENT: dict[str, Callable[[], Exception]] = {
    "refused": ConnectionRefusedError,
    "reset": partial(ConnectionResetError, errno.ECONNRESET, "reset"),
    "pipe": BrokenPipeError,
    "timeout": TimeoutError,
    "fsspec timeout": fsspec.exceptions.FSTimeoutError,
    "name": partial(socket.gaierror, socket.EAI_AGAIN, "try again"),
    "stale mount": partial(OSError, errno.ESTALE, "stale"),
    "no route": partial(OSError, errno.EHOSTUNREACH, "no route"),
    "no endpoint": partial(boto.EndpointConnectionError, endpoint_url="http://h"),
    "slow connect": partial(boto.ConnectTimeoutError, endpoint_url="http://h"),
    "slow answer": partial(boto.ReadTimeoutError, endpoint_url="http://h"),
    "closed": partial(boto.ConnectionClosedError, endpoint_url="http://h"),
    "body": partial(boto.ResponseStreamingError, error="x"),
    "short body": partial(boto.IncompleteReadError, actual_bytes=1, expected_bytes=2),
    "truncated": truncated,
    "disconnected": aiohttp.ServerDisconnectedError,
    "SlowDown": partial(answered, "SlowDown", 503),
    "InternalError": partial(answered, "InternalError", 500),
    "InternalError after 200": partial(answered, "InternalError", 200),
    "gateway": partial(answered, "502", 502),
    "lost upload": partial(answered, "NoSuchUpload", 404),
    "skewed body": partial(answered, "IncompleteBody", 400),
    "too many": partial(StatusError, 429),
}
PERMANENT: dict[str, Callable[[], Exception]] = {
    "permission": partial(PermissionError, errno.EACCES, "no"),
    "folder": partial(IsADirectoryError, errno.EISDIR, "no"),
    "full": partial(OSError, errno.ENOSPC, "no space"),
    "AccessDenied": partial(answered, "AccessDenied", 403),
    "InvalidAccessKeyId": partial(answered, "InvalidAccessKeyId", 403),
    "SignatureDoesNotMatch": partial(answered, "SignatureDoesNotMatch", 403),
    "ExpiredToken": partial(answered, "ExpiredToken", 400),
    "NoSuchBucket": partial(answered, "NoSuchBucket", 404),
    "no storage left": partial(answered, "InsufficientStorage", 507),
    "not implemented": partial(answered, "NotImplemented", 501),
    "no credentials": boto.NoCredentialsError,
    "no profile": partial(boto.ProfileNotFound, profile="x"),
    "certificate": partial(boto.SSLError, endpoint_url="h", error="CERTIFICATE_VERIFY_FAILED"),
    "Google's no": partial(StatusError, 401),
}


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.001)


@pytest.mark.parametrize("kind", TRANSIENT)
def test_faults_that_pass_are_waited_for(
    kind: str, tmp_path: Path, hurry: None, capfd: pytest.CaptureFixture[str]
) -> None:
    random.seed(7)
    state = random.getstate()
    filesystem = Flaky([])
    write_atomic(filesystem, "/folder/x", b"data")
    (tmp_path / "local").write_bytes(b"data")
    for operation, expected in (
        (partial(read_bytes, filesystem, "/folder/x"), b"data"),
        (partial(write_atomic, filesystem, "/folder/x", b"data"), None),
        (partial(read_ranges, filesystem, "/folder/x", [(0, 2), (1, 3)]), [b"da", b"at"]),
        (partial(publish, filesystem, tmp_path / "local", "/folder/y"), None),
        (partial(exists, filesystem, "/folder/y"), True),
        (partial(file_size, filesystem, "/folder/y"), 4),
        (partial(list_folder, filesystem, "/folder"), ["/folder/x", "/folder/y"]),
        (partial(list_tree, filesystem, "/"), {"/folder/x": 4, "/folder/y": 4}),
        (partial(remove, filesystem, "/folder/y"), None),
    ):
        filesystem.errors = [TRANSIENT[kind]() for _ in range(3)]
        assert operation() == expected
        assert not filesystem.errors
        first, last = capfd.readouterr().err.splitlines()  # two lines, whatever the attempts
        assert "trying again for up to 120 s" in first
        assert " WARNING cannot " in first
        assert " INFO storage is back: could " in last
        assert last.endswith((" and 3 attempts", " and 4 attempts"))
    assert random.getstate() == state


@pytest.mark.parametrize("kind", PERMANENT)
def test_faults_that_stay_are_reported_at_once(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    filesystem = Flaky([PERMANENT[kind]()])
    with pytest.raises(StorageError, match=r"^cannot read 'flaky:///x': .+; .+") as error:
        read_bytes(filesystem, "/x")
    assert filesystem.requests == 1
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_missing_file_is_no_fault(capfd: pytest.CaptureFixture[str]) -> None:
    filesystem = Flaky([answered("NoSuchKey", 404), FileNotFoundError("x")])
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            read_bytes(filesystem, "/x")
    assert not filesystem.errors
    assert capfd.readouterr().err == ""


def test_mistakes_of_this_software_are_not_hidden() -> None:
    with pytest.raises(KeyError):
        read_bytes(Flaky([KeyError("x")]), "/x")


def test_only_ranges_that_failed_are_read_again(hurry: None) -> None:
    filesystem = Flaky([])
    write_atomic(filesystem, "/x", b"0123456789")
    filesystem.errors, filesystem.requests = [ConnectionResetError(), answered("416", 416)], 0
    ranges = [(0, 3), (20, 30), (3, 6), (6, 9)]
    assert read_ranges(filesystem, "/x", ranges) == [b"012", b"", b"345", b"678"]
    assert filesystem.requests == len(ranges) + 1


def test_an_upload_that_arrives_shorter_is_an_error(tmp_path: Path) -> None:
    class Short(Flaky):
        def info(self, path: str, **options: Any) -> dict[str, Any]:
            return {**super().info(path, **options), "size": 3}

    (tmp_path / "local").write_bytes(b"data")
    with pytest.raises(StorageError, match="4 bytes were sent and 3 bytes found"):
        publish(Short([]), tmp_path / "local", "/x")
    assert (tmp_path / "local").exists()


def test_the_limit_is_kept_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(Flaky):
        def cat_file(self, path: str, **options: Any) -> bytes:
            raise ConnectionRefusedError("AWS_SECRET_ACCESS_KEY=hunter2 at s3://k:hunter2@b/x")

    start = time.monotonic()
    monkeypatch.setenv(RETRY_VARIABLE, "0.5")
    with pytest.raises(StorageError) as error:
        read_bytes(Dead([]), "/x")
    assert 0.5 <= time.monotonic() - start < 5
    assert "gave up after 0 s and" in str(error.value) or "after 1 s" in str(error.value)
    assert "hunter2" not in str(error.value)
    monkeypatch.setenv(RETRY_VARIABLE, "0")
    with pytest.raises(StorageError, match="1 attempts"):
        read_bytes(Dead([]), "/x")


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan", "inf", "1e999"])
def test_a_limit_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: str
) -> None:
    monkeypatch.setenv(RETRY_VARIABLE, seconds)
    for operation in (Store.open, Store.exists, list_files):
        with pytest.raises(UserError) as error:
            operation(str(tmp_path))
        assert str(error.value) == (
            f"HASTE_STORAGE_RETRY_SECONDS='{seconds}': give a number of seconds, 0 or more"
        )
