"""REPA's preprocessed folders as a source."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.datasets import list_images, open_reader
from pipeline.datasets import repa as repa_module
from pipeline.datasets.repa import first_latents, list_repa
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from tests.repa import image_name, latent_name, random_repa, write_labels


def test_every_latent_is_listed_with_the_image_of_its_number(tmp_path: Path) -> None:
    source = str(random_repa(tmp_path))
    listing = list_repa(source)
    assert listing.num_classes == 2
    assert [(item.key, item.label) for item in listing.items] == [
        (f"00000/img{number:08d}", number % 2) for number in range(6)
    ]
    first = listing.items[0]
    assert (first.path, first.latent) == (
        "images/00000/img00000000.png",
        "vae-sd/00000/img-mean-std-00000000.npy",
    )
    config = ExtractConfig(dataset="repa", source=source)
    assert sorted(list_images(config).items) == sorted(listing.items)
    read = open_reader(config)
    assert read(first) == (tmp_path / "images" / image_name(0)).read_bytes()


def test_order_is_by_number_for_any_order_of_the_list(tmp_path: Path) -> None:
    numbers = [2001, 3, 999, 1000, 0]
    write_labels(tmp_path, "vae-sd", [[latent_name(n), n % 7] for n in numbers])
    listing = list_repa(str(tmp_path))
    assert [item.path for item in listing.items] == [
        f"images/{image_name(n)}" for n in sorted(numbers)
    ]
    assert [item.label for item in listing.items] == [n % 7 for n in sorted(numbers)]


def test_fewer_latents_than_images_are_fine(tmp_path: Path) -> None:
    """``encode --max-images`` writes such folders."""
    random_repa(tmp_path)
    write_labels(tmp_path, "vae-sd", [[latent_name(n), n % 2] for n in range(3)])
    assert len(list_repa(str(tmp_path)).items) == 3


def test_first_latents_reads_the_head_of_the_list_only(tmp_path: Path) -> None:
    write_labels(tmp_path, "vae-sd", [[latent_name(n), 0] for n in range(5000)])
    found = list(first_latents(str(tmp_path)))
    assert 16 < len(found) < 200
    assert [item.latent for item in found] == [
        f"vae-sd/{latent_name(n)}" for n in range(len(found))
    ]


GOOD = [[latent_name(0), 0], [latent_name(1), 1]]
EXPECTED = r"expected \[name, class number\]"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not JSON"),
        ('{"labels": [["00000', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", 'expected {"labels":'),
        ("{}", 'expected {"labels":'),
        ('{"labels": 3}', 'expected {"labels":'),
        ('{"labels": null}', "its labels are null"),
        ('{"labels": []}', "lists no latents"),
    ],
)
def test_a_damaged_list_is_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    random_repa(tmp_path)
    (tmp_path / "vae-sd" / "dataset.json").write_text(text)
    assert_refused(tmp_path, complaint)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ([latent_name(1), 1], r"entry 2 repeats .*00000001\.npy\""),
        ([latent_name(2), None], rf"entry 2 is \[.*, null\]; {EXPECTED}"),
        ([latent_name(2), -1], EXPECTED),
        ([latent_name(2), True], EXPECTED),
        ([latent_name(2), 1.0], EXPECTED),
        ([latent_name(2), 1 << 40], EXPECTED),
        ([latent_name(2), [0, 1]], EXPECTED),
        ([latent_name(2)], EXPECTED),
        (None, EXPECTED),
        ("x" * 5000, EXPECTED),
        ([7, 1], EXPECTED),
        (["../../etc/img-mean-std-00000002.npy", 1], "is not the name of a latent"),
        (["00000/../../img-mean-std-00000002.npy", 1], "is not the name of a latent"),
        (["/00000/img-mean-std-00000002.npy", 1], "is not the name of a latent"),
        (["00000/img-mean-std-00000002.npy\n", 1], "is not the name of a latent"),
        ([image_name(2), 1], "is not the name of a latent"),
    ],
)
def test_a_bad_entry_is_named(tmp_path: Path, entry: object, complaint: str) -> None:
    write_labels(tmp_path, "vae-sd", [*GOOD, entry])
    assert_refused(tmp_path, complaint)


@pytest.mark.parametrize("missing", ["", "vae-sd/dataset.json"])
def test_a_missing_list_is_one_line(tmp_path: Path, missing: str) -> None:
    if missing:
        (random_repa(tmp_path) / missing).unlink()
    assert_refused(tmp_path, r"lists no latents in vae-sd/dataset\.json: expected images/ and")


def test_a_list_beyond_the_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repa_module, "MAX_JSON_BYTES", 50)
    random_repa(tmp_path)
    assert_refused(tmp_path, "bytes; the limit is 50")


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([[image_name(0), 0], [image_name(1), 0]], "class 1, images/dataset.json gives .* 0:"),
        ([[image_name(0), 0], [image_name(2), 1]], "gives .*img00000001.png none: these latents"),
        (None, "images/dataset.json: its labels are null"),
    ],
)
def test_latents_of_other_images_are_refused(
    tmp_path: Path, entries: object, complaint: str
) -> None:
    write_labels(tmp_path, "vae-sd", GOOD)
    write_labels(tmp_path, "images", entries)
    assert_refused(tmp_path, complaint)


def assert_refused(source: Path, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        list_repa(str(source))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert str(source) in str(error.value)
    assert "dataset.json" in str(error.value)
