"""Files on a real object store, while it is there, while it is away and when it comes back."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from s3fs import S3FileSystem

from pipeline.checkpoints import shares
from pipeline.checkpoints.integrity import verify
from pipeline.checkpoints.remote import RemoteCheckpoints
from pipeline.checkpoints.selection import latest_valid
from pipeline.checkpoints.state import verify_finite
from pipeline.datasets import list_images
from pipeline.datasets.imagenet import read_synsets
from pipeline.datasets.repa import first_latents
from pipeline.datasets.tar_shards import list_tars
from pipeline.storage import filesystem as filesystem_module
from pipeline.storage.files import (
    RETRY_VARIABLE,
    StorageError,
    exists,
    file_size,
    list_folder,
    list_tree,
    open_url,
    publish,
    read_bytes,
    read_ranges,
    remove,
    write_atomic,
)
from pipeline.storage.filesystem import READ_SECONDS
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from tests.pipeline.checkpoints.test_background import contents_of, written
from tests.pipeline.checkpoints.test_shares import parts_of, save_all, tensors_of
from tests.pipeline.train.test_loop import assert_same_weights
from tests.s3 import KEY, SECRET, SeaweedFS


@pytest.fixture
def bucket(s3: SeaweedFS) -> str:
    return s3.bucket()


@contextmanager
def away(server: SeaweedFS) -> Iterator[None]:
    """The server is dead within, and there again afterwards."""
    server.kill()
    try:
        yield
    finally:
        server.restart()


def test_every_operation_on_s3(bucket: str, tmp_path: Path) -> None:
    filesystem, root = open_url(f"{bucket}/store/", what="--store")
    data = bytes(range(256)) * 40
    assert list_folder(filesystem, root) == []
    assert list_tree(filesystem, root) == {}
    assert not exists(filesystem, f"{root}/a/1")
    write_atomic(filesystem, f"{root}/a/1", data)
    write_atomic(filesystem, f"{root}/a/2", b"")
    (tmp_path / "local").write_bytes(data[:100])
    publish(filesystem, tmp_path / "local", f"{root}/b/3")
    assert not (tmp_path / "local").exists()

    assert read_bytes(filesystem, f"{root}/a/1") == data
    assert read_bytes(filesystem, f"{root}/a/2") == b""
    ranges = [(5, 9), (0, 0), (3, 3), (10_000, 20_000), (20_000, 20_001), (0, 10_240)]
    assert read_ranges(filesystem, f"{root}/a/1", ranges) == [data[b:e] for b, e in ranges]
    assert read_ranges(filesystem, f"{root}/a/2", [(0, 4)]) == [b""]
    assert list_folder(filesystem, root) == [f"{root}/a", f"{root}/b"]
    assert list_folder(filesystem, f"{root}/a") == [f"{root}/a/1", f"{root}/a/2"]
    assert list_tree(filesystem, root) == {
        f"{root}/a/1": len(data),
        f"{root}/a/2": 0,
        f"{root}/b/3": 100,
    }
    assert exists(filesystem, f"{root}/a/1")
    assert exists(filesystem, f"{root}/a")
    assert file_size(filesystem, f"{root}/b/3") == 100

    remove(filesystem, f"{root}/a/1")
    remove(filesystem, f"{root}/a/1")
    assert list_folder(filesystem, f"{root}/a") == [f"{root}/a/2"]
    for missing in (read_bytes, file_size):
        with pytest.raises(FileNotFoundError):
            missing(filesystem, f"{root}/a/1")
    with pytest.raises(FileNotFoundError):
        read_ranges(filesystem, f"{root}/a/1", [(0, 1)])


def test_listings_see_what_others_wrote(bucket: str) -> None:
    ours, root = open_url(f"{bucket}/x", what="--store")
    theirs, _ = open_url(bucket, what="--store")
    theirs = type(theirs)(skip_instance_cache=True)
    for number in range(3):
        theirs.pipe_file(f"{root}/{number}", b"new")
        names = [f"{root}/{n}" for n in range(number + 1)]
        assert list_folder(ours, root) == names
        assert list(list_tree(ours, root)) == names
        assert exists(ours, names[-1])


def test_a_server_that_is_killed_and_returns_is_waited_for(
    s3: SeaweedFS, bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    filesystem, root = open_url(bucket, what="--store")
    data = os.urandom(4 << 20)
    write_atomic(filesystem, f"{root}/known", data)
    (tmp_path / "large").write_bytes(data * 27)  # large enough to be sent in parts
    written, stop = threading.Semaphore(0), threading.Event()
    ranges = [(at, at + (1 << 18)) for at in range(0, len(data), 1 << 18)]

    def write() -> None:
        for number in range(8):
            local = tmp_path / f"shard-{number}"
            local.write_bytes(data)
            publish(filesystem, local, f"{root}/shards/{number}")
            written.release()

    def write_large() -> None:
        publish(filesystem, tmp_path / "large", f"{root}/large/file")

    def read() -> int:
        rounds = 0
        while not stop.is_set():
            assert b"".join(read_ranges(filesystem, f"{root}/known", ranges)) == data
            assert read_bytes(filesystem, f"{root}/known") == data
            rounds += 1
        return rounds

    with ThreadPoolExecutor(3) as pool:
        writers, reader = [pool.submit(write), pool.submit(write_large)], pool.submit(read)
        try:
            assert written.acquire(timeout=30)
            # a large file is not there before all of it is
            assert list_tree(filesystem, f"{root}/large") in ({}, {f"{root}/large/file": 27 << 22})
            with away(s3):
                time.sleep(4)
            for writer in writers:
                writer.result(timeout=60)
        finally:
            stop.set()
        assert reader.result(timeout=60)
    sizes = list_tree(filesystem, f"{root}/shards")
    assert sizes == {f"{root}/shards/{number}": len(data) for number in range(8)}
    for number in range(8):
        assert read_bytes(filesystem, f"{root}/shards/{number}") == data
    assert read_bytes(filesystem, f"{root}/large/file") == data * 27
    shown = capfd.readouterr().err
    assert "trying again for up to 120 s" in shown
    assert "storage is back" in shown
    assert SECRET not in shown
    assert KEY not in shown


def test_a_server_that_stays_dead_is_one_clear_error(
    s3: SeaweedFS,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(RETRY_VARIABLE, "2")
    filesystem, root = open_url(bucket, what="--store")
    (tmp_path / "local").write_bytes(b"precious")
    operations = [
        lambda: read_bytes(filesystem, f"{root}/x"),
        lambda: read_ranges(filesystem, f"{root}/x", [(0, 1), (2, 3)]),
        lambda: write_atomic(filesystem, f"{root}/x", b"data"),
        lambda: publish(filesystem, tmp_path / "local", f"{root}/x"),
        lambda: exists(filesystem, f"{root}/x"),
        lambda: list_folder(filesystem, f"{root}/x"),
        lambda: list_tree(filesystem, f"{root}/x"),
        lambda: remove(filesystem, f"{root}/x"),
    ]
    with away(s3), ThreadPoolExecutor(len(operations)) as pool:
        start = time.monotonic()
        tries = [pool.submit(operation) for operation in operations]
        errors = [one.exception() for one in tries]
        took = time.monotonic() - start
    assert took < 2 + 2 * READ_SECONDS  # the limit and the longest that one attempt may last
    for error in errors:
        assert isinstance(error, StorageError)
        message = str(error)
        assert f"'{bucket}/x'" in message
        assert "gave up after" in message
        assert "check that the storage is up" in message
        assert "\n" not in message
        assert str(pickle.loads(pickle.dumps(error))) == message
        assert SECRET not in message
    assert (tmp_path / "local").read_bytes() == b"precious"
    assert SECRET not in capfd.readouterr().err


def test_a_server_that_never_answers_is_noticed(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRY_VARIABLE, "1")
    monkeypatch.setattr(filesystem_module, "READ_SECONDS", 0.5)
    monkeypatch.setattr(filesystem_module, "UPLOAD_BYTES_PER_SECOND", 64 << 20)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        filesystem, root = open_url("s3://bucket/silent", what="--store")
        start = time.monotonic()
        with pytest.raises(StorageError, match="Read timeout on endpoint"):
            read_bytes(filesystem, root)
        # small enough to be in the kernel's buffers, and large enough not to be
        for size in (10, 64 << 20):
            with pytest.raises(StorageError, match="gave up after"):
                write_atomic(filesystem, root, bytes(size))
        assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("environment", "path", "advice"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "hunter3/quite+wrong"}, "bucket-1/x", "check the credentials"),
        ({"AWS_ACCESS_KEY_ID": "AKIAHUNTER3HUNTER3"}, "bucket-1/x", "check the credentials"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "bucket-1/x", "AWS_PROFILE"),
        ({"AWS_PROFILE": "nobody"}, "bucket-1/x", "nobody"),
        ({}, "no-such-bucket/x", "create the bucket"),
    ],
)
def test_refusals_are_reported_at_once(
    s3: SeaweedFS,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    environment: dict[str, str],
    path: str,
    advice: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    filesystem, root = open_url(f"s3://{path}", what="--store")
    filesystem = type(filesystem)(**filesystem.storage_options, skip_instance_cache=True)
    filesystem.retries = 1
    (tmp_path / "local").write_bytes(b"x")
    start = time.monotonic()
    for operation in (
        lambda: read_bytes(filesystem, root),
        lambda: read_ranges(filesystem, root, [(0, 1)]),
        lambda: write_atomic(filesystem, root, b"x"),
        lambda: publish(filesystem, tmp_path / "local", root),
        lambda: exists(filesystem, root),
        lambda: list_folder(filesystem, root),
        lambda: list_tree(filesystem, root),
    ):
        with pytest.raises(StorageError) as error:
            operation()
        message = str(error.value)
        assert advice in message
        assert "\n" not in message
        for secret in (SECRET, *environment.values()):
            assert not secret or secret == "nobody" or secret not in message
    assert time.monotonic() - start < 10
    assert capfd.readouterr().err == ""


def test_credentials_in_the_url_are_refused(s3: SeaweedFS) -> None:
    for url in ("s3://key:hunter/2@bucket/x", "simplecache::s3://key:hunter2@bucket/x"):
        with pytest.raises(UserError, match="AWS_PROFILE") as error:
            open_url(url, what="--store")
        assert "hunter" not in str(error.value)


def sources_that_are_away(tmp_path: Path) -> dict[str, dict[str, str]]:
    """Options of each data set that lead to storage."""
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    (tmp_path / "train" / "n01440764" / "1.JPEG").write_bytes(b"")
    away = "s3://somewhere/images"
    names = ("imagenet", "folder", "webdataset", "repa")
    return {
        **{name: {"dataset": name, "source": away} for name in names},
        "synsets": {"dataset": "imagenet", "source": str(tmp_path), "synsets": f"{away}/s.txt"},
    }


@pytest.mark.parametrize("name", ["imagenet", "folder", "webdataset", "repa", "synsets"])
def test_a_source_that_is_away_is_one_line(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    config = ExtractConfig.model_validate(sources_that_are_away(tmp_path)[name])
    monkeypatch.setenv(RETRY_VARIABLE, "0.5")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3FileSystem.clear_instance_cache()  # one that lives is still connected to the server
    start = time.monotonic()
    with pytest.raises(UserError, match="gave up after") as error:
        list_images(config)
    if name == "repa":
        with pytest.raises(UserError, match="gave up after"):
            list(first_latents(str(config.source)))
    S3FileSystem.clear_instance_cache()
    assert time.monotonic() - start < 10
    assert "s3://somewhere/images" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tar_whose_server_goes_while_it_is_read_is_one_line(
    s3: SeaweedFS, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem, root = open_url(bucket, what="--store")
    write_atomic(filesystem, f"{root}/a.tar", bytes(10240))
    monkeypatch.setenv(RETRY_VARIABLE, "0.5")
    monkeypatch.setattr("pipeline.datasets.tar_shards.list_files", lambda source: ["a.tar"])
    with away(s3), pytest.raises(UserError, match="gave up after") as error:
        list_tars(bucket)
    assert f"{bucket}/a.tar" in str(error.value)


def test_every_data_set_is_listed_from_s3(s3: SeaweedFS, bucket: str, tmp_path: Path) -> None:
    filesystem, root = open_url(bucket, what="--store")
    wnid = "n01440764"
    write_atomic(filesystem, f"{root}/in/train/{wnid}/1.JPEG", b"x")
    write_atomic(filesystem, f"{root}/in/synsets.txt", f"{wnid} tench\nn02102040 dog\n".encode())
    labels = {"images": "00000/img00000000.png", "vae-sd": "00000/img-mean-std-00000000.npy"}
    for folder, name in labels.items():
        data = json.dumps({"labels": [[name, 4]]}).encode()
        write_atomic(filesystem, f"{root}/repa/{folder}/dataset.json", data)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {"x.jpg": b"picture", "x.cls": b"3"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    publish(filesystem, tmp_path / "a.tar", f"{root}/tars/a.tar")
    for options, keys, classes in (
        ({"dataset": "folder", "source": f"{bucket}/in/train"}, [f"{wnid}/1"], 1),
        ({"dataset": "imagenet", "source": f"{bucket}/in"}, [f"{wnid}/1"], 1),
        ({"dataset": "repa", "source": f"{bucket}/repa"}, ["00000/img00000000"], 5),
        ({"dataset": "webdataset", "source": f"{bucket}/tars"}, ["x"], 4),
        ({"dataset": "webdataset", "source": f"{bucket}/tars/a.tar"}, ["x"], 4),
    ):
        listing = list_images(ExtractConfig.model_validate(options))
        assert ([item.key for item in listing.items], listing.num_classes) == (keys, classes)
    assert read_synsets(f"{bucket}/in/synsets.txt") == [wnid, "n02102040"]
    with pytest.raises(UserError, match=r"--synsets .*no such file"):
        read_synsets(f"{bucket}/in/none.txt")
    assert [item.label for item in first_latents(f"{bucket}/repa")] == [0]
    with pytest.raises(UserError, match="no such file"):
        list(first_latents(f"{bucket}/none"))


def test_a_url_without_a_bucket_is_told_as_such() -> None:
    for url in ("s3://", "s3:///"):
        with pytest.raises(UserError, match="names no bucket"):
            open_url(url, what="--store")


def test_checkpoints_of_several_workers(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker dies; two others replace what three had begun, then keep one checkpoint."""
    monkeypatch.setattr(shares, "MIN_BYTES", 1)
    url = f"{bucket}/run"
    filesystem, root = open_url(url, what="--output")
    checkpoints = RemoteCheckpoints(filesystem, root, url, keep=1)
    with patch.object(shares, "LIMIT_SECONDS", 3.0):
        (error,) = save_all(checkpoints, 4, parts_of(contents_of(1), 3, 1)[:2]).values()
    assert "share 3 of 3 was not written" in str(error)
    assert latest_valid(checkpoints, tmp_path) is None
    for step in (4, 6):
        assert not save_all(checkpoints, step, parts_of(contents_of(step), 2, step))
    written(contents_of(6), tmp_path / "expected")
    found = latest_valid(checkpoints, tmp_path, verify_finite)
    assert found is not None
    assert found[0] == 6
    assert_same_weights(tensors_of(found[1]), tensors_of(tmp_path / "expected"))
    listed = {*verify(found[1])["files"], "state.json"}
    assert set(list_tree(filesystem, root)) == {f"{root}/{found[1].name}/{n}" for n in listed}
