"""Class-per-folder trees, keys, and the fixed order of every data set."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from pipeline.datasets import ImageItem, Listing, list_images, open_reader, reader
from pipeline.datasets.crop import BadImageError
from pipeline.datasets.folder import list_class_folders, make_items
from schemas.errors import UserError
from schemas.extract import ExtractConfig


def make_tree(root: Path, *paths: str) -> str:
    """Each file contains its own path."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    return str(root)


def keys(listing: Listing) -> dict[str, int]:
    assert len({item.key for item in listing.items}) == len(listing.items)
    return {item.key: item.label for item in listing.items}


def test_label_is_the_rank_of_the_class_folder(tmp_path: Path) -> None:
    source = make_tree(tmp_path, "b/1.jpg", "b/deep/er/2.png", "a/3.jpg", "c/4", "no_class.jpg")
    listing = list_class_folders(source)
    assert keys(listing) == {"a/3": 0, "b/1": 1, "b/deep/er/2": 1, "c/4": 2}
    assert listing.num_classes == 3


def test_files_that_share_a_stem_keep_distinct_keys(tmp_path: Path) -> None:
    source = make_tree(tmp_path, "a/x.jpg", "a/x.png", "a/x.jpg.jpg", "a/x", "b/x.jpg")
    listing = list_class_folders(source)
    assert len(keys(listing)) == 5
    assert "b/x" in keys(listing)


def test_dots_in_names_are_escaped_so_that_webdataset_keeps_the_key(tmp_path: Path) -> None:
    names = ("a.b/v1.2.jpg", "a.b/v1%2E2.jpg", "a.b/v1%2.jpg", "c/d.e.f")
    found = keys(list_class_folders(make_tree(tmp_path, *names)))
    assert len(found) == 4
    assert all("." not in key for key in found)
    assert "a%2Eb/v1%2E2" in found


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    source = make_tree(tmp_path, "a/1.jpg", "a/.DS_Store", ".git/x/y.jpg", "a/.cache/z.jpg")
    assert keys(list_class_folders(source)) == {"a/1": 0}


def test_a_source_below_a_hidden_folder_is_not_hidden(tmp_path: Path) -> None:
    source = make_tree(tmp_path / ".cache" / "set", "a/1.jpg")
    assert keys(list_class_folders(source)) == {"a/1": 0}


@pytest.mark.parametrize("dataset", ["folder", "imagenet", "webdataset"])
def test_empty_or_missing_source_is_one_line(tmp_path: Path, dataset: str) -> None:
    for source in (tmp_path, tmp_path / "missing"):
        config = ExtractConfig.model_validate({"dataset": dataset, "source": str(source)})
        with pytest.raises(UserError, match="--source") as error:
            list_images(config)
        assert str(source) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dataset", ["folder", "imagenet", "webdataset"])
def test_absent_source_is_one_line(dataset: str) -> None:
    with pytest.raises(UserError, match="--source is missing"):
        list_images(ExtractConfig.model_validate({"dataset": dataset}))


def test_storage_that_cannot_be_reached_is_one_line_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: object, path: str, **_: object) -> list[str]:
        raise RuntimeError("no route to\n memory://me:hunter2@host/x?token=hunter3\nat all")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "find", refuse)
    with pytest.raises(UserError, match="no route to") as error:
        list_class_folders("memory://me:hunter2@host/x")
    assert "hunter" not in str(error.value)
    assert "\n" not in str(error.value)


def test_order_is_a_permutation_that_depends_on_the_seed_alone(tmp_path: Path) -> None:
    source = make_tree(tmp_path, *(f"{c}/{i}.jpg" for c in "abc" for i in range(20)))

    def order(seed: int) -> list[str]:
        config = ExtractConfig(dataset="folder", source=source, order_seed=seed)
        return [item.key for item in list_images(config).items]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1)) == sorted(keys(list_class_folders(source)))
    assert order(0) != sorted(order(0))


def test_order_never_changes_between_versions() -> None:
    """Later versions complete stores of earlier ones; recorded with the first version."""
    items = make_items([f"a/{i}.jpg" for i in range(8)], [0] * 8)
    shuffled = Listing(items, 1).shuffled(0)
    assert [item.key for item in shuffled.items] == [f"a/{i}" for i in (2, 4, 3, 6, 5, 0, 1, 7)]


def test_fingerprint_tells_keys_labels_and_order_apart() -> None:
    a, b = ImageItem("a", 0, "a.jpg"), ImageItem("b", 1, "b.jpg")
    listings = [[a, b], [b, a], [a], [a, b._replace(label=0)], [a, b._replace(key="c")]]
    assert len({Listing(items, 2).fingerprint() for items in listings}) == len(listings)
    moved = [a._replace(path="elsewhere/a.jpg", offset=7, length=3), b]
    assert Listing(moved, 2).fingerprint() == Listing([a, b], 2).fingerprint()


def test_the_reader_reads_what_was_listed(tmp_path: Path) -> None:
    make_tree(tmp_path, "a/x.jpg", "a/x.png", "b/c.d/e.jpg")
    config = ExtractConfig(dataset="folder", source=f"file://{tmp_path}/")
    read = open_reader(config)
    listed = list_images(config).items
    assert len(listed) == 3
    assert all(read(item).decode() == item.path for item in listed)


@pytest.mark.parametrize("name", [b"x\xff.jpg", b"a\nb.jpg", b"\x1b[31m.jpg", b"x" * 250])
def test_a_file_whose_name_no_store_holds_is_named(tmp_path: Path, name: bytes) -> None:
    folder = tmp_path / "a" / "/".join(4 * ["d" * 200])
    folder.mkdir(parents=True)
    (folder / os.fsdecode(name)).write_bytes(b"")
    with pytest.raises(UserError, match=r"/a/d+/.*: sample 'a/d{198}.* has a name ") as error:
        list_images(ExtractConfig(dataset="folder", source=str(tmp_path)))
    assert str(error.value).isprintable()


def test_an_image_that_is_no_file_or_too_large_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_BYTES", 10)
    make_tree(tmp_path, "a/10.bytes", "a/11.bytes!")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "zeros.png").symlink_to("/dev/zero")
    config = ExtractConfig(dataset="folder", source=str(tmp_path))
    read, items = open_reader(config), {item.path: item for item in list_images(config).items}
    assert len(read(items["a/10.bytes"])) == 10
    for path, reason in (
        ("a/11.bytes!", "has 11 bytes; the limit is 10"),
        ("a/pipe.png", "a pipe or a device"),
        ("a/zeros.png", "a pipe or a device"),
    ):
        with pytest.raises(BadImageError, match=reason):
            read(items[path])
    with pytest.raises(BadImageError, match="has 11 bytes"):
        read(items["a/10.bytes"]._replace(length=11))
    with pytest.raises(IsADirectoryError):
        read(ImageItem("a", 0, "a"))


def test_no_more_is_fetched_of_an_image_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_BYTES", 10)
    with fsspec.open("memory://test-large/a/1.jpg", "wb") as file:
        file.write(bytes(11))
    config = ExtractConfig(dataset="folder", source="memory://test-large")
    (item,) = list_images(config).items
    with pytest.raises(BadImageError, match="has 11 bytes; the limit is 10"):
        open_reader(config)(item)


def test_sources_on_other_filesystems_are_listed_and_read() -> None:
    with fsspec.open("memory://test-folder/images/dog/1.jpg", "wb") as file:
        file.write(b"one")
    config = ExtractConfig(dataset="folder", source="memory://test-folder/images")
    (item,) = list_images(config).items
    assert (item.key, item.path, open_reader(config)(item)) == ("dog/1", "dog/1.jpg", b"one")


def test_linked_class_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    elsewhere, source = tmp_path / "elsewhere", tmp_path / "source"
    for folder in (elsewhere, source / "a", source / "c"):
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(b"")
    (source / "b").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(source)
    listing = list_class_folders(str(source))
    assert [(item.path, item.label) for item in listing.items] == [
        ("a/x.png", 0),
        ("b/x.png", 1),
        ("c/x.png", 2),
    ]
