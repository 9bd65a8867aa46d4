"""Class numbers and names: ranks never shift, whatever a folder holds or lacks."""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from pipeline.datasets import Listing, list_images, open_reader
from pipeline.datasets.class_names import class_numbers
from pipeline.datasets.crop import BadImageError
from pipeline.datasets.folder import list_class_folders
from pipeline.datasets.imagenet import list_imagenet
from pipeline.datasets.listing import ImageItem
from pipeline.datasets.reader import FileReader
from schemas.classes import ClassTable, parse_classes
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.fields import format_layers
from tests.pipeline.datasets.test_tar_shards import sample, write_tar

WNIDS = ("n01440764", "n02102040", "n07753592")


def make_tree(root: Path, *paths: str) -> Path:
    """Files, and folders where a path ends with a slash."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).mkdir() if path.endswith("/") else (root / path).write_text(path)
    return root


def labels(listing: Listing) -> dict[str, int]:
    return {item.path: item.label for item in listing.items}


def test_classes_are_those_of_torchvision(tmp_path: Path) -> None:
    """Its ``allow_empty`` has the same meaning: nested and linked images, upper-case names, empty
    folders, and folders of folders without images."""
    elsewhere = make_tree(tmp_path / "elsewhere", "x/1.png")
    source = make_tree(
        tmp_path / "set", "b/1.PNG", "a/", "B/2.jpg", "c/deep/er/3.JPEG", "d/deep/", "z/4.bmp"
    )
    (source / "linked").symlink_to(elsewhere)
    (source / "b" / "also.png").symlink_to(elsewhere / "x" / "1.png")
    theirs = ImageFolder(str(source), allow_empty=True)
    ours = list_class_folders(str(source), allow_empty=True)
    assert list(ours.class_names) == theirs.classes
    assert labels(ours) == {str(Path(p).relative_to(source)): n for p, n in theirs.samples}
    used = {label for _, label in theirs.samples}
    assert list(ours.empty_classes) == sorted(set(range(ours.num_classes)) - used)
    with pytest.raises(UserError, match=r"class folder 'a', 'd'; .* --allow-empty-classes"):
        list_class_folders(str(source))


@pytest.mark.parametrize("content", [(), ("b/.DS_Store",), ("b/.cache/1.png",)])
def test_a_class_without_images_keeps_its_number(tmp_path: Path, content: tuple[str, ...]) -> None:
    source = make_tree(tmp_path, "a/1.png", "c/2.png", ".git/3.png", "b/", *content)
    with pytest.raises(UserError, match="no images in class folder 'b'; "):
        list_class_folders(str(source))
    kept = list_class_folders(str(source), allow_empty=True)
    assert labels(kept) == {"a/1.png": 0, "c/2.png": 2}
    assert (kept.num_classes, kept.empty_classes) == (3, (1,))
    assert kept.shuffled(0).class_names == ("a", "b", "c")


def test_a_class_folder_that_leads_back_is_empty(tmp_path: Path) -> None:
    source = make_tree(tmp_path, "a/1.png", "c/2.png")
    (source / "b").symlink_to(source)
    with pytest.raises(UserError, match="class folder 'b'"):
        list_class_folders(str(source))


@pytest.mark.parametrize(
    ("link", "target"),
    [("b/1.png", "/nowhere/1.png"), ("bee", "/nowhere"), ("b/deep", "gone"), ("b/me", "me")],
)
@pytest.mark.parametrize("allow_empty", [False, True])
def test_links_that_lead_nowhere_are_named(
    tmp_path: Path, link: str, target: str, allow_empty: bool
) -> None:
    source = make_tree(tmp_path, "a/1.png", "b/2.png")
    (source / link).symlink_to(target)
    with pytest.raises(UserError, match=rf"--source '.*': links that lead nowhere: {link}; "):
        list_class_folders(str(source), allow_empty=allow_empty)


def test_only_some_of_many_broken_links_are_named_and_hidden_ones_are_ignored(
    tmp_path: Path,
) -> None:
    source = make_tree(tmp_path, "a/1.png")
    (source / "a" / ".#lock").symlink_to("user@host.123")
    (source / ".me").symlink_to(".me")
    assert labels(list_class_folders(str(source))) == {"a/1.png": 0}
    for number in range(9):
        (source / "a" / f"{number}.jpg").symlink_to("/nowhere")
    with pytest.raises(UserError, match=r"a/0.jpg, .*, a/4.jpg and 4 more; "):
        list_class_folders(str(source))


@pytest.mark.parametrize(
    ("dataset", "link"), [("imagenet", f"train/{WNIDS[1]}"), ("webdataset", "2.tar")]
)
def test_broken_links_are_errors_in_other_data_sets(
    tmp_path: Path, dataset: str, link: str
) -> None:
    make_tree(tmp_path, f"train/{WNIDS[0]}/1.JPEG", "1.tar")
    (tmp_path / link).symlink_to("/nowhere")
    config = ExtractConfig.model_validate({"dataset": dataset, "source": str(tmp_path)})
    with pytest.raises(UserError, match="links that lead nowhere: "):
        list_images(config)


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, scandir = make_tree(tmp_path, "a/1.png", "b/2.png"), os.scandir

    def locked(path: str) -> object:
        if str(path).endswith("/b"):  # as chmod 0, which root may ignore
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(UserError, match=r"--source '.*'.*Permission denied: '.*/b'"):
        list_class_folders(str(source), allow_empty=True)


def test_files_outside_of_class_folders_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_tree(tmp_path, "a/1.png", "stray.png", "list.txt")
    assert labels(list_class_folders(str(source))) == {"a/1.png": 0}
    assert "ignored 2 files that are in no class folder, first: list.txt" in caplog.text


def test_an_empty_class_whose_name_no_store_holds_is_named(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/b\xff")
    make_tree(tmp_path, "a/1.png")
    options = {"dataset": "folder", "source": str(tmp_path), "allow_empty_classes": True}
    with pytest.raises(UserError, match=r"class folder 'b\\udcff' has a name with control"):
        list_images(ExtractConfig.model_validate(options))


def test_folders_of_an_archive_count_as_they_do_on_disk(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as zipped:
        for name in ("set/a/1.png", "set/b/", "set/c/2.png"):
            zipped.writestr(name, b"")
    source = f"zip://set::{tmp_path}/set.zip"
    with pytest.raises(UserError, match="class folder 'b'"):
        list_class_folders(source)
    kept = list_class_folders(source, allow_empty=True)
    assert labels(kept) == {"a/1.png": 0, "c/2.png": 2}
    assert kept.class_names == ("a", "b", "c")


def test_a_damaged_member_of_a_zip_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("a/1.png", b"0123456789")
        zipped.writestr("a/2.png", b"abcdefghij")
    path.write_bytes(path.read_bytes().replace(b"01234", b"01x34", 1))
    read = FileReader(f"zip://::{path}")
    with pytest.raises(BadImageError, match=r"damaged in its archive \(Bad CRC-32"):
        read(ImageItem("a/1", 0, "a/1.png"))
    assert read(ImageItem("a/2", 0, "a/2.png")) == b"abcdefghij"


def test_a_link_to_nothing_in_an_archive_is_a_bad_image(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        link = tarfile.TarInfo("a/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "gone.png"
        tar.addfile(link)
    config = ExtractConfig(dataset="folder", source=f"tar://::{tmp_path}/set.tar")
    (item,) = list_images(config).items
    with pytest.raises(BadImageError, match="a link to a file that its archive lacks"):
        open_reader(config)(item)


def test_an_empty_wnid_keeps_its_number(tmp_path: Path) -> None:
    source = make_tree(tmp_path, f"train/{WNIDS[0]}/1.JPEG", f"train/{WNIDS[2]}/2.JPEG")
    (source / "train" / WNIDS[1]).mkdir()
    with pytest.raises(UserError, match=f"class folder '{WNIDS[1]}'"):
        list_imagenet(str(source), None)
    kept = list_imagenet(str(source), None, allow_empty=True)
    assert (set(labels(kept).values()), kept.class_names) == ({0, 2}, WNIDS)
    (source / "train" / WNIDS[1]).rmdir()
    (source / "train" / f"{WNIDS[1]}.tar").write_bytes(b"")
    with pytest.raises(UserError, match=f"train/{WNIDS[1]}.tar is not unpacked"):
        list_imagenet(str(source), None)


def test_a_list_of_classes_is_followed_and_each_is_named_once(tmp_path: Path) -> None:
    source = str(make_tree(tmp_path / "set", *(f"{wnid}/1.JPEG" for wnid in WNIDS)))
    file = tmp_path / "synsets.txt"
    order = (WNIDS[2], "n00000001", WNIDS[0], WNIDS[1])
    file.write_text("\n".join(f"{wnid} some, words" for wnid in order))
    listing = list_imagenet(source, str(file))
    assert {path[:9]: label for path, label in labels(listing).items()} == {
        wnid: order.index(wnid) for wnid in WNIDS
    }
    assert (listing.class_names, listing.empty_classes) == (order, (1,))
    again = list_imagenet(source, None, class_names=listing.class_names)
    assert again == listing
    file.write_text(f"{WNIDS[0]}\n\n{WNIDS[1]}\n{WNIDS[0]}\n{WNIDS[2]}\n")
    with pytest.raises(UserError, match=rf"line 4: {WNIDS[0]} is in line 1, too"):
        list_imagenet(source, str(file))
    config = ExtractConfig(dataset="folder", source=source, synsets=str(file))
    with pytest.raises(UserError, match="--synsets is for ImageNet, not for --dataset folder"):
        list_images(config)


def test_numbers_of_tars_stay_and_can_be_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [part for n in (4, 1) for part in sample(f"s{n}", n, b"image")]
    write_tar(tmp_path / "set" / "a.tar", members)
    options = {"dataset": "webdataset", "source": str(tmp_path / "set")}
    listing = list_images(ExtractConfig.model_validate(options))
    assert {item.key: item.label for item in listing.items} == {"s4": 4, "s1": 1}
    assert (listing.num_classes, listing.class_names) == (5, ())
    assert listing.empty_classes == (0, 2, 3)
    assert "3 of 5 class numbers have no images" in caplog.text
    names = tuple(f"n{n:08d}" for n in range(7))
    (tmp_path / "names").write_text("\n".join(names))
    options["synsets"] = str(tmp_path / "names")
    named = list_images(ExtractConfig.model_validate(options))
    assert named.items == listing.items
    assert (named.num_classes, named.class_names) == (7, names)
    assert named.empty_classes == (0, 2, 3, 5, 6)
    (tmp_path / "names").write_text("\n".join(names[:4]))
    with pytest.raises(UserError, match="an image of class 4; --synsets has classes 0 to 3"):
        list_images(ExtractConfig.model_validate(options))


IMAGENET = ClassTable(count=3, names=WNIDS)
"""tench; flat-coated..., English springer; banana"""
PETS = ClassTable(count=4, names=("cat", "dog", "emu", "fox, red"), empty=(2,))
NUMERALS = ClassTable(count=4, names=("0", "1", "10", "007"))
NAMELESS = ClassTable(count=1000)


@pytest.mark.parametrize(
    ("text", "table", "numbers"),
    [
        ("1,0", PETS, (1, 0)),
        ("dog,0", PETS, (1, 0)),
        ("name:dog", PETS, (1,)),
        (["fox, red", 1], PETS, (3, 1)),
        ("0-1, fox", ClassTable(count=3, names=("a", "b", "fox")), (0, 1, 2)),
        ("018,0-3", NAMELESS, (18, 0, 1, 2, 3)),
        ("n07753592,tench", IMAGENET, (2, 0)),
        ("BANANA,Tinca_tinca", IMAGENET, (2, 0)),
        ("0-1", NUMERALS, (0, 1)),
        ("name:10,name:007", NUMERALS, (2, 3)),
        (7, NAMELESS, (7,)),
        ("", PETS, ()),
    ],
)
def test_numbers_and_names(text: object, table: ClassTable, numbers: tuple[int, ...]) -> None:
    assert class_numbers(parse_classes(text), table, option="--classes") == numbers


@pytest.mark.parametrize(
    ("text", "table", "message"),
    [
        ("4", PETS, "--classes asks for class 4; the model has classes 0 to 3"),
        ("dgo", PETS, r"no class 'dgo' \(did you mean 'dog'\?\)"),
        ("emu", PETS, r"class 2 \(emu\), which has no images"),
        ("2", PETS, r"class 2 \(emu\), which has no images"),
        ("tabby", IMAGENET, "there is no class 'tabby'"),
        ("tabby", NAMELESS, "no class names are known here, so 'tabby' cannot be found"),
        ("7", NUMERALS, "classes 0 to 3; the class called '007' is name:007"),
        ("10", NUMERALS, "classes 0 to 3; the class called '10' is name:10"),
        ("1", ClassTable(count=2, names=("1", "2")), "class number 1 is name:2; .* is name:1; "),
        ("0-1", ClassTable(count=2, names=("1", "2")), "class number 1 is name:2"),
        (
            "crane",
            ClassTable(count=2, names=("n02012849", "n03126707")),
            r"'crane' means classes 0 \(n02012849\), 1 \(n03126707\)",
        ),
    ],
)
def test_what_is_not_certain_is_refused(text: str, table: ClassTable, message: str) -> None:
    with pytest.raises(UserError, match=message):
        class_numbers(parse_classes(text), table, option="--classes")


@pytest.mark.parametrize("text", ["1:30", "0x10", "1e3", "1.5", "-1", "1_000", "3-1", "1-2-3"])
def test_words_that_are_almost_numbers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a (class number|range)"):
        parse_classes(text)


@pytest.mark.parametrize("value", [[True], [1.5], [None], {"a": 1}])
def test_values_of_yaml_that_are_neither_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="is neither a class number nor a name"):
        parse_classes(value)


def test_a_thousand_classes_in_one_range() -> None:
    assert format_layers(class_numbers(parse_classes("0-999"), NAMELESS, option="x")) == "0-999"


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClassTable(count=2, names=("a",)),
        lambda: ClassTable(count=2, names=("a", "a")),
        lambda: ClassTable(count=2, empty=(1, 0)),
        lambda: ClassTable(count=2, empty=(2,)),
    ],
)
def test_tables_that_contradict_themselves_are_refused(make: Callable[[], ClassTable]) -> None:
    with pytest.raises(ValueError, match=r"names of 2|same name|not rising"):
        make()
