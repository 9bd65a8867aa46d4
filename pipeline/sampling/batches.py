"""What is drawn at a time, and of which classes: pure functions of an image's number.

Neither knows how many workers there are, so that their number changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.randomness import Purpose, generator
from schemas.errors import UserError
from schemas.sample import Labels


@dataclass(frozen=True)
class ImageBatch:
    """Images ``first`` to ``first + count - 1``, drawn in one batch."""

    number: int
    first: int
    count: int


def plan_batches(num: int, batch_size: int) -> list[ImageBatch]:
    """``num`` images in blocks of ``batch_size``; the last may have fewer."""
    firsts = range(0, num, batch_size)
    return [ImageBatch(n, first, min(batch_size, num - first)) for n, first in enumerate(firsts)]


def choose_classes(asked: Sequence[int] | None, num_classes: int) -> tuple[int, ...]:
    """The classes to draw from: those asked for, or all. Raises ``UserError``."""
    if asked is None:
        return tuple(range(num_classes))
    if not asked:
        raise UserError("--classes is empty: name class numbers such as 1,2,3")
    if max(asked) >= num_classes:
        raise UserError(
            f"--classes asks for class {max(asked)}; the model has classes 0 to {num_classes - 1}"
        )
    return tuple(asked)


def choose_labels(
    kind: Labels, classes: Sequence[int], seed: int, first: int, count: int
) -> list[int]:
    """The classes of images ``first`` to ``first + count - 1``."""
    numbers = range(first, first + count)
    if kind == "balanced":
        return [classes[number % len(classes)] for number in numbers]
    draws = (generator(Purpose.LABELS, seed, number).integers(len(classes)) for number in numbers)
    return [classes[int(draw)] for draw in draws]
