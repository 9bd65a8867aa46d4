"""scikit-learn's digits as a data set."""

from __future__ import annotations

import numpy as np

from pipeline.datasets import list_images, open_reader
from pipeline.datasets.crop import decode_crop
from pipeline.datasets.digits import digits_images, list_digits
from schemas.extract import ExtractConfig

DEMO = ExtractConfig(dataset="demo")


def test_every_digit_is_listed_once_with_its_class() -> None:
    listing = list_images(DEMO)
    _, labels = digits_images(8)
    assert len(listing.items) == len(labels) == 1797
    assert listing.num_classes == 10
    assert {item.key: item.label for item in listing.items} == {
        f"digit-{i:04d}": label for i, label in enumerate(labels)
    }


def test_the_reader_gives_the_image_of_its_item() -> None:
    images, labels = digits_images(32)
    read = open_reader(DEMO)
    for item in list_images(DEMO).items[:20]:
        number = int(item.key.removeprefix("digit-"))
        assert np.array_equal(decode_crop(read(item), 32), images[number])
        assert item.label == labels[number]


def test_classes_are_mixed_in_the_order_of_the_store() -> None:
    labels = [item.label for item in list_images(DEMO).items]
    assert all(len(set(labels[i : i + 128])) == 10 for i in range(0, 1700, 128))
    assert [item.label for item in list_digits().items] != labels
