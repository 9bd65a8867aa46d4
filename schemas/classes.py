"""Classes: their numbers and names, and options that select some of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from schemas.base import Strict
from schemas.fields import MAX_CLASSES

NAME = "name:"
"""Prefix of a class name that could be read as something else: a number, none, this prefix."""
MAX_CHOSEN = 1 << 20
"""Classes that one option selects."""

ClassNumber = Annotated[int, Field(ge=0, lt=MAX_CLASSES)]
ClassName = Annotated[str, Field(min_length=1, max_length=1024)]


def parse_classes(value: Any) -> Any:
    """``"1,2,tabby"``, ``"0-9"``, an int or a sequence, as a tuple of class numbers and names.

    Decimal numbers and ranges are class numbers; all other words are names. ``name:7`` is the class
    that is called 7. A name with a comma needs a sequence.
    """
    if isinstance(value, str):
        items: list[Any] = [part.strip() for part in value.split(",")] if value.strip() else []
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        items = [value]
    chosen: list[int | str] = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise ValueError(f"{item!r} is neither a class number nor a name: write it in quotes")
        chosen.extend([item] if isinstance(item, int) else _parse_word(item))
        if len(chosen) > MAX_CHOSEN:
            raise ValueError(f"more than {MAX_CHOSEN} classes are named")
    return tuple(chosen)


_NUMERIC = re.compile(
    r"[-+.0-9][-+.:_0-9\s]*|[-+]?0[xobXOB][0-9a-fA-F]+|[-+]?[0-9.]+[eE][-+]?[0-9]+"
)
"""Words that look like numbers; those that are not plain decimal ones are refused."""


def _parse_word(word: str) -> list[int] | list[str]:
    if not word:
        raise ValueError("a class between two commas, or at an end, is missing")
    match = re.fullmatch(r"([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?", word)
    if match is None:
        if _NUMERIC.fullmatch(word):
            raise ValueError(
                f"'{word}' is not a class number or a range such as 0-9; a class of this name is "
                f"{NAME}{word}"
            )
        return [word]
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first or last - first >= MAX_CHOSEN:
        raise ValueError(f"'{word}' is not a range of classes, lowest first")
    return list(range(first, last + 1))


def _each_once(classes: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Repeated classes are refused, because they would get more images than the others."""
    for one, times in Counter(classes).items():
        if times > 1:
            raise ValueError(f"class {one} is named {times} times: name each class once")
    return classes


Classes = Annotated[tuple[ClassNumber | ClassName, ...], BeforeValidator(parse_classes)]
"""Numbers and names of classes, in the order given."""
DistinctClasses = Annotated[Classes, AfterValidator(_each_once)]


def check_classes(count: int, names: Sequence[str], empty: Sequence[int]) -> None:
    """Raises ``ValueError`` unless each of ``count`` classes has one name, or none has, and the
    numbers of the empty ones rise."""
    if names and len(names) != count:
        raise ValueError(f"there are {len(names)} names of {count} classes")
    if len(set(names)) != len(names):
        raise ValueError("two classes have the same name")
    if list(empty) != sorted(set(empty)) or (empty and empty[-1] >= count):
        raise ValueError("the classes without images are not rising class numbers")


class ClassTable(Strict):
    """The classes of a store, or those that a run was trained on."""

    count: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    names: tuple[ClassName, ...] = ()
    """Names in the order of class numbers; empty where they are not known."""
    empty: tuple[ClassNumber, ...] = ()
    """Numbers of classes without images."""

    @model_validator(mode="after")
    def _names_each_class(self) -> ClassTable:
        check_classes(self.count, self.names, self.empty)
        return self

    @property
    def trained(self) -> tuple[int, ...]:
        """Numbers of the classes with images: labels are drawn from these."""
        empty = set(self.empty)
        return tuple(number for number in range(self.count) if number not in empty)
