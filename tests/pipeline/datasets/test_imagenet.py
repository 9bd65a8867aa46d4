"""ImageNet in both layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.datasets import Listing, open_reader
from pipeline.datasets.imagenet import list_imagenet
from schemas.errors import UserError
from schemas.extract import ExtractConfig

WNIDS = ("n01440764", "n02102040", "n07753592")


def make_tree(root: Path, folder: str) -> str:
    for wnid in reversed(WNIDS):
        for number in (2, 10):
            path = root / folder / wnid / f"{wnid}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
    return str(root)


def keys(listing: Listing) -> dict[str, int]:
    return {item.key: item.label for item in listing.items}


@pytest.mark.parametrize("folder", ["train", "ILSVRC/Data/CLS-LOC/train", ""])
def test_every_layout_gives_the_same_keys_and_labels(tmp_path: Path, folder: str) -> None:
    source = make_tree(tmp_path, folder)
    listing = list_imagenet(source, None)
    assert keys(listing) == {
        f"{wnid}/{wnid}_{number}": rank for rank, wnid in enumerate(WNIDS) for number in (2, 10)
    }
    assert listing.num_classes == 3
    read = open_reader(ExtractConfig(dataset="imagenet", source=source))
    assert all(read(item).decode() == f"{item.key.split('/')[1]}.JPEG" for item in listing.items)


def test_other_folders_are_ignored(tmp_path: Path) -> None:
    source = make_tree(tmp_path, "train")
    for other in ("train/readme.txt", "train/extra/x.JPEG", "val/n01440764/y.JPEG"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("")
    assert len(list_imagenet(source, None).items) == 6


@pytest.mark.parametrize("words", ["", " name, other name"])
def test_synset_list_fixes_ranks_and_the_number_of_classes(tmp_path: Path, words: str) -> None:
    """1,000 WNIDs of which the source has three; the number is the position in the list."""
    wnids = sorted({*WNIDS, *(f"n{i:08d}" for i in range(997))})
    file = tmp_path / "synsets.txt"
    file.write_text("".join(f"{wnid}{words}\n" for wnid in reversed(wnids)))
    listing = list_imagenet(make_tree(tmp_path, "train"), str(file))
    assert listing.num_classes == 1000
    ranks = {key.split("/")[0]: label for key, label in keys(listing).items()}
    assert ranks == dict(zip(WNIDS, (2, 1, 0), strict=True))


def test_a_class_that_the_synset_list_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "synsets.txt").write_text(f"{WNIDS[0]}\n{WNIDS[2]}\n")
    with pytest.raises(UserError, match=f"lacks {WNIDS[1]}"):
        list_imagenet(make_tree(tmp_path, "train"), str(tmp_path / "synsets.txt"))


def test_unusable_synset_lists_are_one_line(tmp_path: Path) -> None:
    source = make_tree(tmp_path, "train")
    (tmp_path / "bad.txt").write_text("n01440764\nLOC_synset\n")
    with pytest.raises(UserError, match="line 2: 'LOC_synset' is not a WNID"):
        list_imagenet(source, str(tmp_path / "bad.txt"))
    with pytest.raises(UserError, match=r"--synsets '.*missing.txt': there is no such file"):
        list_imagenet(source, str(tmp_path / "missing.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"--synsets '.*binary.txt': is not a text file"):
        list_imagenet(source, str(tmp_path / "binary.txt"))
    with pytest.raises(UserError, match=r"cannot read .*directory"):
        list_imagenet(source, str(tmp_path))


def test_the_sample_of_real_originals_is_listed(shared: Path) -> None:
    source = shared / "data" / "imagenet_sample"
    listing = list_imagenet(str(source), None)
    wnids = sorted(folder.name for folder in (source / "train").iterdir())
    assert len(listing.items) == 128
    assert listing.num_classes == len(wnids)
    assert all(wnids[item.label] == item.key.split("/")[0] for item in listing.items)
