"""Batches and classes of images: pure functions of an image's number, independent of the number of
workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.datasets.class_names import class_numbers
from pipeline.randomness import Purpose, generator
from schemas.classes import ClassTable
from schemas.errors import UserError
from schemas.sample import Labels


@dataclass(frozen=True)
class ImageBatch:
    """Images ``first`` to ``last``, drawn together."""

    number: int
    first: int
    count: int

    @property
    def last(self) -> int:
        return self.first + self.count - 1


def plan_batches(num: int, batch_size: int) -> list[ImageBatch]:
    """``num`` images in batches of ``batch_size``; the last batch may be smaller."""
    firsts = range(0, num, batch_size)
    return [ImageBatch(n, first, min(batch_size, num - first)) for n, first in enumerate(firsts)]


def choose_classes(requested: Sequence[int | str] | None, classes: ClassTable) -> tuple[int, ...]:
    """Numbers of the requested classes, by default all that were trained on. Raises ``UserError``
    where the model lacks one."""
    if requested is None:
        return classes.trained
    if not requested:
        raise UserError("--classes is empty: name classes such as 1,2,3")
    numbers = class_numbers(requested, classes, option="--classes")
    twice = next((number for number in numbers if numbers.count(number) > 1), None)
    if twice is not None:
        raise UserError(f"--classes names class {twice} twice, by different words: name it once")
    return numbers


def choose_labels(
    kind: Labels, classes: Sequence[int], seed: int, first: int, count: int
) -> list[int]:
    """Classes of the images ``first`` to ``first + count - 1``."""
    numbers = range(first, first + count)
    if kind == "balanced":
        return [classes[number % len(classes)] for number in numbers]
    draws = (generator(Purpose.LABELS, seed, number).integers(len(classes)) for number in numbers)
    return [classes[int(draw)] for draw in draws]
