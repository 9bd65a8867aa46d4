"""WebDataset tars as a source."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import webdataset

from pipeline.datasets import Listing, list_images, open_reader
from schemas.errors import UserError
from schemas.extract import ExtractConfig


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key: str, label: int, image: bytes, suffix: str = "jpg") -> list[tuple[str, bytes]]:
    return [(f"{key}.{suffix}", image), (f"{key}.cls", str(label).encode())]


def listed(source: Path) -> tuple[Listing, dict[str, tuple[int, bytes]]]:
    config = ExtractConfig(dataset="webdataset", source=str(source))
    listing, read = list_images(config), open_reader(config)
    found = {item.key: (item.label, read(item)) for item in listing.items}
    assert len(found) == len(listing.items)
    return listing, found


def test_ranged_reads_return_the_bytes_of_each_image(tmp_path: Path) -> None:
    images = [os.urandom(size) for size in (1, 511, 512, 513, 5000)]
    members = [sample(f"s{i}", i, image) for i, image in enumerate(images)]
    write_tar(tmp_path / "sub" / "a.tar", [part for pair in members[:3] for part in pair])
    write_tar(tmp_path / "b.tar", [part for pair in members[3:] for part in reversed(pair)])
    listing, found = listed(tmp_path)
    assert found == {f"s{i}": (i, image) for i, image in enumerate(images)}
    assert listing.num_classes == 5


def test_the_source_may_be_one_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("x", 3, b"image"))
    write_tar(tmp_path / "b.tar", sample("y", 4, b"other"))
    assert listed(tmp_path / "a.tar")[1] == {"x": (3, b"image")}


def test_keys_repeated_across_tars_stay_apart(tmp_path: Path) -> None:
    for name in ("a.tar", "sub/a.tar"):
        write_tar(tmp_path / name, [*sample("0", 1, name.encode()), *sample(name[0], 2, b"-")])
    _, found = listed(tmp_path)
    assert {image for _, image in found.values()} == {b"a.tar", b"sub/a.tar", b"-"}
    assert len(found) == 4
    assert all("." not in key for key in found)


def test_keys_are_those_of_stock_webdataset(tmp_path: Path) -> None:
    keys = ["plain", "./dotted", "a.b/in_folder", "deep/er/key", "UPPER"]
    for number, key in enumerate(keys):
        write_tar(tmp_path / f"{number}.tar", sample(key, number, b"image"))
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    stock = {item["__key__"] for item in webdataset.WebDataset(urls, shardshuffle=False)}
    assert set(listed(tmp_path)[1]) == stock == set(keys)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp"])
def test_images_may_have_any_usual_suffix_and_other_members_are_ignored(
    tmp_path: Path, suffix: str
) -> None:
    members = [("x.json", b"{}"), *sample("x", 1, b"image", suffix), ("x.seg.png", b"mask")]
    write_tar(tmp_path / "a.tar", members)
    assert listed(tmp_path)[1] == {"x": (1, b"image")}


def test_hidden_members_are_ignored(tmp_path: Path) -> None:
    members = [("._x.jpg", b"?"), *sample("x", 1, b"image"), ("d/.DS_Store", b"?")]
    write_tar(tmp_path / "a.tar", members)
    assert listed(tmp_path)[1] == {"x": (1, b"image")}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("x.jpg", b"image")], r"a\.tar: sample 'x' has no \.cls"),
        ([("x.cls", b"1")], r"a\.tar: sample 'x' has no image"),
        ([("x.jpg", b"image"), ("x.cls", b"dog")], r"a\.tar: x\.cls is not a class number"),
        ([("x.jpg", b"image"), ("x.cls", b"-1")], r"a\.tar: x\.cls is not a class number"),
        ([("x.jpg", b"image"), ("x.cls", b"1" * 33)], r"a\.tar: x\.cls is not a class number"),
        (
            [*sample("x", 1, b"image"), ("x.jpg", b"other")],
            r"a\.tar: x\.jpg is a second image of its sample",
        ),
        (
            [*sample("x", 1, b"image"), ("x.png", b"other")],
            r"a\.tar: x\.png is a second image of its sample",
        ),
        ([*sample("x", 1, b"image"), ("x.cls", b"2")], r"a\.tar: x\.cls occurs twice"),
        ([], "has no samples"),
    ],
)
def test_incomplete_samples_are_named(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str
) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=reason):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("key", "label", "reason"),
    [
        ("x", 20_000_000, r"sample 'x' is of class 20000000; the largest is 16777215"),
        ("x", 99999999999999999999, r"sample 'x' is of class 99999999999999999999; the largest"),
        ("../../x", 1, r"sample '\.\./\.\./x' has a name that leads out of its folder"),
        ("a/../x", 1, r"sample 'a/\.\./x' has a name that leads out of its folder"),
        ("/x", 1, r"sample '/x' has a name that leads out of its folder"),
        ("a\nb", 1, r"sample 'a b' has a name with control characters"),
        ("\x1b[31mx", 1, r"sample '\\x1b\[31mx' has a name with control characters"),
        (os.fsdecode(b"x\xff"), 1, r"sample 'x\\udcff' has a name .* not UTF-8"),
        ("x" * 1025, 1, r"sample 'x{200}\.\.\.' has a name of more than 1024 bytes"),
    ],
)
def test_names_and_labels_that_no_store_holds_are_named(
    tmp_path: Path, key: str, label: int, reason: str
) -> None:
    write_tar(tmp_path / "a.tar", [*sample("fine", 1, b"image"), *sample(key, label, b"image")])
    with pytest.raises(UserError, match=rf"a\.tar: {reason}") as error:
        listed(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["x" * 1024, "a/..b/c", "%2E%2E/x", "Bild\u202f1 \u5199\u771f"])
def test_unusual_names_are_kept(tmp_path: Path, key: str) -> None:
    write_tar(tmp_path / "a.tar", [(f"{key}.jpg", b"image"), (f"{key}.cls", b"16777215")])
    assert listed(tmp_path)[1] == {key: (16777215, b"image")}


def test_a_key_of_two_images_is_named(tmp_path: Path) -> None:
    """A key of several tars gets a prefix, and the result may equal another key."""
    write_tar(tmp_path / "a.tar", [*sample("x", 1, b"one"), *sample("b%2Etar/x", 1, b"two")])
    write_tar(tmp_path / "b.tar", sample("x", 1, b"three"))
    with pytest.raises(
        UserError, match=r"\.tar: sample 'b%2Etar/x' has a key that another one has"
    ):
        listed(tmp_path)


def test_a_pipe_among_the_tars_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar: cannot read this tar \(not a regular file\)"):
        listed(tmp_path)


@pytest.mark.parametrize("size", [-512, -1024, 1 << 62, 1 << 80])
def test_an_impossible_size_is_named(tmp_path: Path, size: int) -> None:
    """A negative size would lead back to an earlier header, in an endless loop."""
    header = tarfile.TarInfo("x.txt")
    header.size = size
    first = tarfile.TarInfo("y.txt").tobuf()
    (tmp_path / "a.tar").write_bytes(first + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match=r"cannot read (this tar|'.*a\.tar')"):
        listed(tmp_path)


@pytest.mark.parametrize("data", [b"", b"no tar" * 500])
def test_a_file_that_is_not_a_tar_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar: cannot read this tar"):
        listed(tmp_path)


def test_a_truncated_tar_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("x", 1, bytes(3000)))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:2000])
    with pytest.raises(UserError, match=r"a\.tar"):
        listed(tmp_path)
