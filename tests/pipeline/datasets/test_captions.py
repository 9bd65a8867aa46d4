"""Sources with captions: MS-COCO, tars of img2dataset, folders with a list."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.datasets import Listing, list_images
from pipeline.datasets.crop import decode_crop
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.store import MAX_CAPTION_BYTES
from tests.captions import CAPTIONS, picture, write_coco
from tests.pipeline.datasets.test_tar_shards import write_tar


def listed(source: Path, dataset: str = "coco", **options: object) -> Listing:
    return list_images(ExtractConfig(dataset=dataset, source=str(source), **options))


def test_coco_is_listed_by_id_with_captions_in_the_order_of_the_file(tmp_path: Path) -> None:
    listing = listed(write_coco(tmp_path))
    assert [item.key for item in listing.items] == ["000007", "000012", "000030"]
    assert listing.items[0].path == "train2014/000007.png"
    for item, number in zip(listing.items, sorted(CAPTIONS), strict=True):
        assert list(item.captions) == CAPTIONS[number][:7]
        assert item.label == 0
    assert listing.num_classes == 1
    assert listing.captions is not None
    assert (listing.captions.captions, listing.captions.beyond_limit) == (11, 1)


def test_each_split_has_its_own_images(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_coco(tmp_path, {3: ["only this"]}, split="val")
    assert [item.key for item in listed(tmp_path, split="val").items] == ["000003"]
    assert len(listed(tmp_path, split="train").items) == 3


def test_whatever_is_left_out_is_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "word " * 2000
    captions = {
        1: ["fine", "", " \n"],
        2: [f"caption {n}" for n in range(100)],
        3: [],
        4: [" "],
        5: ["its file is missing"],
        6: [long],
    }
    write_coco(tmp_path, captions, files=[1, 2, 3, 4, 6])
    (tmp_path / "train2014" / "000009.png").write_bytes(picture(9))
    with caplog.at_level(logging.WARNING):
        listing = listed(tmp_path)
    assert [item.key for item in listing.items] == ["000001", "000002", "000006"]
    assert [len(item.captions) for item in listing.items] == [1, 7, 1]
    assert len(listing.items[2].captions[0].encode()) == MAX_CAPTION_BYTES
    assert listing.captions is not None
    assert listing.captions.model_dump() == {
        "captions": 9,
        "empty": 3,
        "beyond_limit": 93,
        "images_without": 3,
        "without_images": 1,
        "shortened": 1,
    }
    text = caplog.text
    for part in (
        "3 empty captions",
        "93 captions beyond the first 7",
        "3 images without captions, first: train2014/000003.png",
        "captions of 1 missing images, first: train2014/000005.png",
        "the end of 1 captions",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": 3}, "has no list of images"),
        ({"annotations": [3]}, "has no list of annotations"),
        ({"images": [{"id": 7}]}, "image 7 has no file_name"),
        ({"images": [{"id": 7, "file_name": "../x.jpg"}]}, "image 7 has no file_name"),
        ({"images": [{"id": "7", "file_name": "x"}]}, 'an entry of images has id "7"'),
        ({"images": [{"id": 7, "file_name": n} for n in "ab"]}, "image id 7 occurs twice"),
        ({"images": [{"id": n, "file_name": "a"} for n in (1, 2)]}, "'a' is of two images"),
        (
            {"annotations": [{"id": 4, "image_id": 7, "caption": c} for c in "ab"]},
            "annotation id 4 occurs twice",
        ),
        ({"annotations": [{"id": 4, "image_id": 7}]}, "annotation 4 has no caption"),
        ({"annotations": []}, "has no image with a caption"),
    ],
)
def test_bad_annotations_are_one_line(tmp_path: Path, changes: dict, reason: str) -> None:
    write_coco(tmp_path, **changes)
    with pytest.raises(UserError, match=reason) as error:
        listed(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_coco_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"captions_val2014\.json: there is no such file"):
        listed(write_coco(tmp_path), split="val")
    (tmp_path / "annotations" / "captions_train2014.json").write_text("[")
    with pytest.raises(UserError, match="is not JSON"):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dataset": "folder", "split": "val"}, "--split is for MS-COCO"),
        ({"dataset": "coco", "order_seed": 1}, "--order-seed is not for MS-COCO"),
        ({"dataset": "imagenet", "captions": "txt"}, "--captions is not for --dataset imagenet"),
        ({"dataset": "webdataset", "captions": "csv"}, "members txt or json"),
        ({"dataset": "coco", "synsets": "x"}, "--synsets is for ImageNet"),
    ],
)
def test_options_of_other_data_sets_are_refused(
    tmp_path: Path, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        listed(write_coco(tmp_path), **options)


def img2dataset(number: int, caption: str | None, **more: object) -> list[tuple[str, bytes]]:
    key = f"{number:09d}"
    about = {"caption": caption, "url": "http://x", "key": key, **more}
    members = [(f"{key}.jpg", picture(number)), (f"{key}.json", json.dumps(about).encode())]
    return [*members, *([] if caption is None else [(f"{key}.txt", caption.encode())])]


def test_tars_of_img2dataset_have_captions_and_no_classes(tmp_path: Path) -> None:
    members = [*img2dataset(0, "a cat\n"), *img2dataset(1, None), *img2dataset(2, "caf\u00e9")]
    lost = [("000000003.json", b'{"caption": "no picture"}')]
    write_tar(tmp_path / "00000.tar", [*members, *lost])
    listing = listed(tmp_path, "webdataset")
    found = {item.key: item.captions for item in listing.items}
    assert found == {"000000000": ("a cat",), "000000002": ("caf\u00e9",)}
    assert listing.captions is not None
    assert (listing.captions.images_without, listing.captions.without_images) == (1, 1)
    assert (listing.num_classes, {item.label for item in listing.items}) == (1, {0})


def test_samples_without_a_caption_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [*img2dataset(0, "a cat"), *img2dataset(1, None)]
    write_tar(tmp_path / "00000.tar", members)
    with caplog.at_level(logging.WARNING):
        listed(tmp_path, "webdataset")
    assert "1 images without captions, first: 00000.tar: sample '000000001'" in caplog.text


def test_a_source_without_any_caption_says_what_it_has(tmp_path: Path) -> None:
    lines = [{"file": "/data/b.png", "captions": ["x"]}]
    options = write_folder(tmp_path, lines)
    with pytest.raises(UserError) as error:
        listed(tmp_path / "pictures", **options)
    reason = "3 images have none, first: b.png; captions are of 1 missing images, first: /data/b"
    assert reason in str(error.value)


def test_json_members_may_have_several_captions(tmp_path: Path) -> None:
    about = json.dumps({"captions": ["one", "two"]}).encode()
    write_tar(tmp_path / "a.tar", [("x.jpg", picture(0)), ("x.json", about), ("x.txt", b"text")])
    assert listed(tmp_path, "webdataset").items[0].captions == ("text",)
    assert listed(tmp_path, "webdataset", captions="json").items[0].captions == ("one", "two")


def test_tars_with_classes_have_captions_only_where_asked(tmp_path: Path) -> None:
    members = [("x.jpg", picture(0)), ("x.cls", b"4"), ("x.txt", b"a bird"), ("x.json", b"{}")]
    write_tar(tmp_path / "a.tar", members)
    plain = listed(tmp_path, "webdataset")
    assert plain.captions is None
    assert (plain.items[0].captions, plain.items[0].label) == ((), 4)
    both = listed(tmp_path, "webdataset", captions="txt")
    assert (both.items[0].captions, both.items[0].label) == (("a bird",), 4)
    assert both.num_classes == 5
    assert both.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("x.txt", b"\xff\xfe"), r"x\.txt is not text in UTF-8"),
        (("x.json", b"{"), r"x\.json is not JSON"),
        (("x.json", b"[]"), r"x\.json is not a JSON object"),
        (("x.json", b'{"caption": 3}'), r"x\.json: its caption is not a text"),
        (("x.json", b'{"caption": ["a", 3]}'), r"x\.json: its caption is not a text"),
        (("x.json", b'{"caption": null}'), "no image with a caption"),
        (("x.txt", bytes((1 << 20) + 1)), "the limit is 1048576"),
    ],
)
def test_bad_caption_members_are_named(
    tmp_path: Path, member: tuple[str, bytes], reason: str
) -> None:
    write_tar(tmp_path / "a.tar", [("x.jpg", picture(0)), member])
    with pytest.raises(UserError, match=reason):
        listed(tmp_path, "webdataset")


def write_folder(root: Path, lines: list[object]) -> dict[str, object]:
    for number, name in enumerate(("b.png", "deep/er/a.png", "c.png")):
        path = root / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    file = root / "list.jsonl"
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return {"dataset": "folder", "captions": str(file)}


def test_a_folder_with_a_list_of_captions(tmp_path: Path) -> None:
    lines = [
        {"file": "deep/er/a.png", "captions": ["one", "two"]},
        {"file": "b.png", "caption": "single"},
        "",
        {"file": "lost.png", "captions": ["x"]},
    ]
    options = write_folder(tmp_path, lines)
    listing = listed(tmp_path / "pictures", **options)
    assert {i.path: i.captions for i in listing.items} == {
        "b.png": ("single",),
        "deep/er/a.png": ("one", "two"),
    }
    assert listing.captions is not None
    assert (listing.captions.images_without, listing.captions.without_images) == (1, 1)
    assert listing.num_classes == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: is not JSON"),
        ("[]", 'line 2: expected {"file"'),
        ({"file": "b.png"}, "line 2: 'b.png' is in line 1"),
        ({"file": "./b.png", "captions": []}, "line 2: 'b.png' is in line 1"),
        ({"file": "c.png", "captions": 3}, 'line 2: expected {"file"'),
        ({"captions": ["x"]}, 'line 2: expected {"file"'),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: object, reason: str) -> None:
    options = write_folder(tmp_path, [{"file": "b.png", "captions": ["x"]}, line])
    with pytest.raises(UserError, match=reason):
        listed(tmp_path / "pictures", **options)


def test_a_list_inside_the_source_is_not_an_image(tmp_path: Path) -> None:
    write_folder(tmp_path, [])
    file = tmp_path / "pictures" / "list.jsonl"
    file.write_text('{"file": "b.png", "captions": ["x"]}')
    listing = listed(tmp_path / "pictures", "folder", captions=str(file))
    assert listing.captions is not None
    assert listing.captions.images_without == 2


def test_a_changed_caption_changes_the_digest_of_captions_alone(tmp_path: Path) -> None:
    before = listed(write_coco(tmp_path))
    after = listed(write_coco(tmp_path, {**CAPTIONS, 7: ["two cats"]}))
    assert before.fingerprint() == after.fingerprint()
    assert before.captions_sha256() != after.captions_sha256()


def test_square_lanczos_is_the_centre_square_resized() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (36, 51, 3), np.uint8)
    image = Image.fromarray(pixels[:, 7:43])  # (51 - 36) // 2
    expected = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    found = decode_crop(buffer.getvalue(), 32, crop="square_lanczos")
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(decode_crop(buffer.getvalue(), 32), expected)
