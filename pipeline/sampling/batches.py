"""Batches and classes of images: pure functions of an image's number, independent of the number of
workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.randomness import Purpose, generator
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


def choose_classes(requested: Sequence[int] | None, num_classes: int) -> tuple[int, ...]:
    """The requested classes, by default all. Raises ``UserError`` where the model lacks one."""
    if requested is None:
        return tuple(range(num_classes))
    if not requested:
        raise UserError("--classes is empty: name class numbers such as 1,2,3")
    if max(requested) >= num_classes:
        raise UserError(
            f"--classes asks for class {max(requested)}; the model has classes 0 to "
            f"{num_classes - 1}"
        )
    return tuple(requested)


def choose_labels(
    kind: Labels, classes: Sequence[int], seed: int, first: int, count: int
) -> list[int]:
    """Classes of the images ``first`` to ``first + count - 1``."""
    numbers = range(first, first + count)
    if kind == "balanced":
        return [classes[number % len(classes)] for number in numbers]
    draws = (generator(Purpose.LABELS, seed, number).integers(len(classes)) for number in numbers)
    return [classes[int(draw)] for draw in draws]
