"""How samples were drawn, in few words."""

from __future__ import annotations

import pytest

from schemas.fields import MAX_TEXT, format_layers, parse_layers
from tests.pipeline.evaluate.sets import about_samples


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((3,), "3"), ((0, 1, 2, 7), "0-2,7"), ((5, 4, 4, 5), "5,4,4-5")],
)
def test_numbers_in_short(numbers: tuple[int, ...], text: str) -> None:
    assert format_layers(numbers) == text
    assert not numbers or parse_layers(text) == numbers


def test_an_interval_without_guidance_means_nothing() -> None:
    plain = about_samples(sampler={"steps": 50}).sampling
    assert about_samples(sampler={"steps": 50, "guidance_high": 0.5}).sampling == plain
    guided = {"steps": 50, "guidance": 1.5}
    whole = about_samples(sampler=guided).sampling
    assert about_samples(sampler={**guided, "guidance_high": 0.5}).sampling != whole


@pytest.mark.parametrize(
    "change",
    [
        {"labels": "balanced"},
        {"classes": (1, 2)},
        {"autoencoder_sha256": "c" * 64},
        {"precision": "bfloat16"},
        {"sampler": {"steps": 50, "seed": 1}},
    ],
)
def test_what_makes_other_images_is_another_way_to_draw(change: dict[str, object]) -> None:
    assert about_samples(**change).sampling != about_samples().sampling


def test_where_things_lie_does_not_matter() -> None:
    moved = about_samples(autoencoder="/copy/of/it", checkpoint="/elsewhere", step=400)
    assert moved.sampling == about_samples().sampling


def test_very_many_classes_are_a_digest() -> None:
    many = about_samples(classes=tuple(range(0, 1000, 2))).sampling
    assert len(many.classes) <= MAX_TEXT
    assert many != about_samples(classes=tuple(range(0, 998, 2))).sampling
