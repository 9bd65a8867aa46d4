"""Batches of images, their classes and labels."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.sampling.batches import ImageBatch, choose_classes, choose_labels, plan_batches
from schemas.classes import ClassTable
from schemas.errors import UserError


def test_every_image_is_in_one_batch() -> None:
    batches = plan_batches(10, 4)
    assert batches == [ImageBatch(0, 0, 4), ImageBatch(1, 4, 4), ImageBatch(2, 8, 2)]
    assert plan_batches(4, 4) == [ImageBatch(0, 0, 4)]
    assert plan_batches(1, 64) == [ImageBatch(0, 0, 1)]


def test_balanced_labels_have_equal_counts() -> None:
    labels = choose_labels("balanced", range(7), seed=0, first=0, count=700)
    assert set(Counter(labels).values()) == {100}
    uneven = Counter(choose_labels("balanced", (2, 5, 9), seed=0, first=0, count=11))
    assert uneven == {2: 4, 5: 4, 9: 3}


@pytest.mark.parametrize("kind", ["balanced", "random"])
def test_labels_belong_to_image_numbers(kind: str) -> None:
    labels = choose_labels(kind, range(10), 3, 0, 50)  # type: ignore[arg-type]
    parts = [choose_labels(kind, range(10), 3, first, 5) for first in range(0, 50, 5)]  # type: ignore[arg-type]
    assert labels == [label for part in parts for label in part]


def test_random_labels_are_uniform_over_the_requested_classes() -> None:
    counts = Counter(choose_labels("random", (3, 4, 8), seed=1, first=0, count=3000))
    assert set(counts) == {3, 4, 8}
    assert all(850 < count < 1150 for count in counts.values())
    assert choose_labels("random", range(10), 1, 0, 50) != choose_labels(
        "random", range(10), 2, 0, 50
    )


def test_classes() -> None:
    three = ClassTable(count=3, names=("a", "b", "c"))
    assert choose_classes(None, three) == (0, 1, 2)
    assert choose_classes(None, three.model_copy(update={"empty": (1,)})) == (0, 2)
    assert choose_classes([2, "b"], three) == (2, 1)
    with pytest.raises(UserError, match="class 3; the model has classes 0 to 2"):
        choose_classes((3,), three)
    with pytest.raises(UserError, match="--classes is empty"):
        choose_classes((), three)
    with pytest.raises(UserError, match="names class 1 twice"):
        choose_classes(("b", 1), three)
