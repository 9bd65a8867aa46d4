"""WebDataset tars as a source."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import logging
import os
import re
import subprocess
import tarfile
import threading
from collections.abc import Iterable
from pathlib import Path

import fsspec
import pytest
import webdataset

from pipeline.datasets import Listing, list_images, open_reader
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.store import SkippedImage


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


def stock(*tars: Path) -> dict[str, tuple[int, bytes]]:
    """Samples of image and class as stock webdataset reads them."""
    data = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
    return {
        item["__key__"]: (
            int(item["cls"]),
            next(item[s] for s in ("jpg", "png", "pgm") if s in item),
        )
        for item in data
    }


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


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
        ("../../x", 1, r"sample '\.\./\.\./x' has an absolute name or '..' in it"),
        ("a/../x", 1, r"sample 'a/\.\./x' has an absolute name or '..' in it"),
        ("/x", 1, r"sample '/x' has an absolute name or '..' in it"),
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
    with pytest.raises(UserError, match=r"\.tar: sample 'b%2Etar/x' has the key of another sample"):
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


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_as_stock_webdataset_reads_them(tmp_path: Path, format: int) -> None:
    """Metadata, members without a suffix, folders and links are skipped; suffixes may be
    capitals; names may be long; samples of other folders may have the same name."""
    long = "d" * 90 + "/" + "n" * 120
    with tarfile.open(
        tmp_path / "a.tar", "w", format=format, pax_headers={"comment": "global"}
    ) as tar:
        for name in ("__shard__", "README", "__info__/0.json", "__meta.x__", "deep/LICENSE"):
            add(tar, name, b"{}")
        add(tar, "folder.jpg", type=tarfile.DIRTYPE)
        for number, key in enumerate(["0", "dir/0", "dir2/0", long, "\u5199\u771f", "./x/y"]):
            add(tar, f"{key}.JPG" if number % 2 else f"{key}.pgm", f"image {number}".encode())
            add(tar, f"{key}.CLS" if number % 3 else f"{key}.cls", f" {number}\n".encode())
            add(tar, f"{key}.json", b"{}")
            add(tar, f"{key}.png", type=tarfile.SYMTYPE, linkname="elsewhere.png")
        add(tar, "0.pgm", type=tarfile.LNKTYPE, linkname="0.pgm")  # GNU tar of one file, twice
    found = listed(tmp_path)[1]
    assert found == stock(tmp_path / "a.tar")
    assert len(found) == 6


@pytest.mark.parametrize("type", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_sample_that_loses_its_image_to_a_link_is_refused(tmp_path: Path, type: bytes) -> None:
    """Also one that consists of links only, which stock webdataset leaves out without a word."""
    for case, label in (("one", {}), ("both", {"type": type, "linkname": "0.cls"})):
        (tmp_path / case).mkdir()
        with tarfile.open(tmp_path / case / "a.tar", "w") as tar:
            for name, data in sample("0", 1, b"image"):
                add(tar, name, data)
            add(tar, "1.jpg", type=type, linkname="0.jpg")
            add(tar, "1.cls", b"" if label else b"1", **label)
        with pytest.raises(
            UserError, match=r"a\.tar: sample '1' has no image .* 1\.jpg \(a .* link\)"
        ):
            listed(tmp_path / case)


@pytest.mark.parametrize(
    "format",
    [
        ["--format=gnu"],
        ["--sparse-version=0.0"],
        ["--sparse-version=0.1"],
        ["--sparse-version=1.0"],
    ],
)
def test_a_sparse_image_is_refused(tmp_path: Path, format: list[str]) -> None:
    """Its bytes in the tar are not those of the file that ``tar -x`` restores."""
    with (tmp_path / "0.ppm").open("wb") as file:
        file.write(b"P6 300 300 255 ")
        file.seek(200_000)
        file.write(bytes(range(256)) * 16)
        file.truncate(300_000)
    (tmp_path / "0.cls").write_text("0")
    pax = [] if format == ["--format=gnu"] else ["--format=pax"]
    command = ["tar", "-C", tmp_path, *pax, *format, "-S", "-cf", tmp_path / "a.tar"]
    subprocess.run([*command, "0.cls", "0.ppm"], check=True)
    if (tmp_path / "a.tar").stat().st_size > 300_000:
        pytest.skip("this filesystem has no holes")
    with pytest.raises(UserError, match=r"a\.tar: 0\.ppm is sparse"):
        listed(tmp_path / "a.tar")


def test_names_with_dots_are_explained(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("im_22.05", 3, b"image", "png"))
    assert {
        item["__key__"]
        for item in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    } == {"im_22"}
    with pytest.raises(UserError, match=r"'im_22' has no image .*im_22\.05\.png.* first dot"):
        listed(tmp_path)


@pytest.mark.parametrize("value", ["3.0", "+3", "-1", "", "1_000", "3\x00", "\u0663"])
def test_a_class_that_is_not_a_number_is_shown(tmp_path: Path, value: str) -> None:
    write_tar(tmp_path / "a.tar", [("x.jpg", b"image"), ("x.cls", value.encode())])
    with pytest.raises(UserError, match=r"a\.tar: x\.cls is not a class number: it contains '"):
        listed(tmp_path)


def cut_points(data: bytes) -> list[int]:
    """Ends of the members of a tar."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [*[info.offset for info in tar][1:], tar.offset]


def test_a_tar_without_its_end_block_is_refused(tmp_path: Path) -> None:
    """Cut between members, it is a shorter data set for stock webdataset."""
    members = [part for i in range(4) for part in sample(f"s{i}", i, os.urandom(700))]
    write_tar(tmp_path / "a.tar", members)
    whole = (tmp_path / "a.tar").read_bytes()
    ends = cut_points(whole)
    for end in ends[1::2]:  # after each sample
        (tmp_path / "a.tar").write_bytes(whole[:end])
        assert len(stock(tmp_path / "a.tar")) == (ends.index(end) + 1) // 2
        with pytest.raises(UserError, match=rf"a\.tar: .*ends at byte {end} without an end block"):
            listed(tmp_path)
    for size in range(0, len(whole) - 9000, 97):  # in headers, members and padding
        (tmp_path / "a.tar").write_bytes(whole[:size])
        if size < ends[-1] + 512:
            with pytest.raises(UserError, match=r"a\.tar"):
                listed(tmp_path)
    (tmp_path / "a.tar").write_bytes(whole[: ends[-1] + 512])  # one block, as some tools write
    assert len(listed(tmp_path)[1]) == 4


def test_data_after_the_end_block_and_damaged_headers_are_refused(tmp_path: Path) -> None:
    """``cat a.tar b.tar``, a hole that a download left, and a header of other bytes: tarfile takes
    each for the end of the tar."""
    for name in ("a.tar", "b.tar"):
        write_tar(
            tmp_path / name,
            [*sample(f"{name[0]}0", 0, bytes(600)), *sample(f"{name[0]}1", 1, b"x")],
        )
    first, second = ((tmp_path / name).read_bytes() for name in ("a.tar", "b.tar"))
    (tmp_path / "b.tar").unlink()
    ends = cut_points(first)
    damaged = {
        r"data follows its end block": first + second,
        rf"data follows its end block at byte {ends[1]}": (
            first[: ends[1]] + bytes(512) + first[ends[1] + 512 :]
        ),
        rf"the header at byte {ends[1]} is damaged": (
            first[: ends[1]] + b"x" * 512 + first[ends[1] + 512 :]
        ),
    }
    for reason, data in damaged.items():
        (tmp_path / "a.tar").write_bytes(data)
        assert len(stock(tmp_path / "a.tar")) < 4
        with pytest.raises(UserError, match=rf"a\.tar: cannot read this tar \(.*{reason}"):
            listed(tmp_path)


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tgz", "sub/b.tar.zst", "b.TAR.XZ"])
def test_a_compressed_tar_among_others_is_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", sample("x", 1, b"image"))
    write_tar(tmp_path / name, sample("y", 1, b"image"))
    with pytest.raises(UserError, match=rf"{name} is compressed"):
        listed(tmp_path)


def test_a_compressed_tar_of_another_name_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("x", 1, b"image"))
    (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert set(stock(tmp_path / "a.tar")) == {"x"}
    with pytest.raises(UserError, match=r"a\.tar: cannot read this tar \(it is compressed"):
        listed(tmp_path)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("{000..002}.tar", [0, 1, 2]),
        ("{0{00..01},003}.tar", [0, 1, 3]),
        ("00[12].tar", [1, 2]),
        ("*.tar", [0, 1, 2, 3]),
        ("{*1,003}.tar", [1, 3]),
        ("s{u,}b/*.tar", [4]),
        ("**/004.tar", [4]),
    ],
)
def test_patterns_name_tars(tmp_path: Path, pattern: str, numbers: list[int], memory: bool) -> None:
    if "{u,}" in pattern and memory:
        pattern = "sub/*.tar"  # a pattern of two folders, of which only one exists
    for number in range(5):
        path = f"sub/{number:03}.tar" if number == 4 else f"{number:03}.tar"
        write_tar(tmp_path / path, sample(f"s{number}", number, f"image {number}".encode()))
    (tmp_path / ".tmp-1.tar").write_bytes(b"hidden")
    source = f"{tmp_path}/{pattern}"
    if memory:
        fsspec.filesystem("memory").put(f"{tmp_path}/", "/patterns", recursive=True)
        source = f"memory://patterns/{pattern}"
    config = ExtractConfig(dataset="webdataset", source=source)
    listing, read = list_images(config), open_reader(config)
    found = {item.key: (item.label, read(item)) for item in listing.items}
    assert found == {f"s{n}": (n, f"image {n}".encode()) for n in numbers}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("{000..003}.tar", r"001\.tar: cannot read this tar \(there is no such file\)"),
        ("{000,000}.tar", r"names 000\.tar twice"),
        ("{000..001.tar", r"000\.\.001\.tar': Unbalanced braces"),
        ("*.tgz", r"000\.tgz is compressed"),
        ("9*.tar", r"has no \.tar files"),
        ("000.tar::000.tar", r"not by '::'"),
        ("missing", r"missing' does not exist, or has no \.tar files"),
    ],
)
def test_patterns_that_name_no_tars_are_refused(tmp_path: Path, pattern: str, reason: str) -> None:
    write_tar(tmp_path / "000.tar", sample("x", 0, b"image"))
    write_tar(tmp_path / "000.tgz", sample("x", 0, b"image"))
    with pytest.raises(UserError, match=reason):
        list_images(ExtractConfig(dataset="webdataset", source=f"{tmp_path}/{pattern}"))


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "set[1]{a,b}" / "a.tar", sample("x", 1, b"image"))
    assert set(listed(tmp_path / "set[1]{a,b}")[1]) == {"x"}


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", [*sample("x", 5, b"image"), *sample("y", 3, b"image")])
    write_tar(tmp_path / "empty.tar", [])
    (tmp_path / "stats.json").write_text("{}")
    with caplog.at_level(logging.INFO):
        assert listed(tmp_path)[0].num_classes == 6
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "1 files that are not .tar are not read, such as stats.json" in said
    assert "empty.tar has no samples" in said
    assert "4 of 6 class numbers have no images (0, 1, 2, 4)" in said


def test_a_damaged_image_is_named_by_tar_and_sample(tmp_path: Path) -> None:
    from pipeline.extract.job import _report_bad_images  # needs Ray

    config = ExtractConfig(dataset="webdataset", source=str(tmp_path))
    bad = [SkippedImage(key="1", path="a.tar", error="image file is truncated")]
    with pytest.raises(UserError, match=r"bad image a\.tar: sample '1' \(image file is truncated"):
        _report_bad_images(bad, config)


class PlainServer(http.server.SimpleHTTPRequestHandler):
    """Without ranges: each request is answered with the whole file."""

    def log_message(self, *_: object) -> None:
        pass


class RangeServer(PlainServer):
    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        if "Range" not in self.headers:
            super().do_GET()
            return
        first, last = re.findall(r"\d+|$", self.headers["Range"])[:2]
        part = data[int(first) : int(last or len(data)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.mark.parametrize("name", ["a.tar", "{a,b}.tar"])
def test_tars_are_read_over_http_from_servers_with_ranges(tmp_path: Path, name: str) -> None:
    for letter in "ab":
        write_tar(tmp_path / f"{letter}.tar", sample(letter, 1, f"image {letter}".encode()))
    for handler in (RangeServer, PlainServer):
        made = functools.partial(handler, directory=str(tmp_path))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), made) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                source = f"http://127.0.0.1:{server.server_port}/{name}"
                config = ExtractConfig(dataset="webdataset", source=source)
                listing, read = list_images(config), open_reader(config)
                assert {item.key for item in listing.items} == set("ab" if "b" in name else "a")
                for item in listing.items:
                    if handler is RangeServer:
                        assert read(item) == f"image {item.key}".encode()
                        continue
                    with pytest.raises(UserError, match=f"'{item.key}': .*not support ranges"):
                        read(item)
            finally:
                server.shutdown()
