"""Class numbers from numbers and names of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.datasets.imagenet import WNID
from pipeline.datasets.listing_check import short_name
from pipeline.text import shortened
from schemas.classes import NAME, ClassTable
from schemas.errors import UserError, escaped, plain_text
from schemas.validation import suggest


def class_numbers(
    chosen: Sequence[int | str], table: ClassTable, *, option: str
) -> tuple[int, ...]:
    """The numbers of ``chosen`` classes, in their order.

    A number is a class number. It is refused where it is the name of another class, because it
    could mean either; ``name:7`` is the class called 7. A name is one of the table's, or for WNIDs
    a word of ImageNet such as tabby. Raises ``UserError`` naming ``option`` for unknown
    classes, and for those without images.
    """
    names = {name: number for number, name in enumerate(table.names)}
    other = {int(n): n for n, i in names.items() if n.isascii() and n.isdigit() and int(n) != i}
    empty = set(table.empty)
    numbers = []
    for one in chosen:
        number = _number_of(one, names, table, option) if isinstance(one, str) else one
        hint = f"; the class called '{other[one]}' is {NAME}{other[one]}" if one in other else ""
        if number >= table.count:
            raise UserError(
                f"{option} asks for class {number}; the model has classes 0 to {table.count - 1}"
                f"{hint}"
            )
        if hint:
            raise UserError(
                f"{option}: class number {number} is {NAME}{short_name(table.names[number])}"
                f"{hint}; write which of them is meant"
            )
        if number in empty:
            raise UserError(
                f"{option} asks for class {_shown(number, table)}, which has no images to train "
                "on; leave it out"
            )
        numbers.append(number)
    return tuple(numbers)


def row_name(number: int, table: ClassTable) -> str:
    """Number and name of a class for a row of a picture."""
    name = table.names[number] if table.names else ""
    named = name not in ("", str(number))
    return f"{number} {shortened(plain_text(name), 20)}" if named else str(number)


def _number_of(one: str, names: Mapping[str, int], table: ClassTable, option: str) -> int:
    name = one.removeprefix(NAME)
    if not names:
        raise UserError(
            f"{option}: no class names are known here, so '{short_name(name)}' cannot be found; "
            "give class numbers"
        )
    if name in names:
        return names[name]
    found = _by_words(name, names)
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(_shown(number, table) for number in found)
        raise UserError(f"{option}: '{short_name(name)}' means classes {several}: give one of them")
    hint = escaped(suggest(name, list(names)))
    raise UserError(
        f"{option}: there is no class '{short_name(name)}'{hint}; python -m pipeline.inspect STORE "
        "lists them"
    )


def _by_words(name: str, names: Mapping[str, int]) -> list[int]:
    """Numbers of the WNIDs that ImageNet describes by the word ``name``."""
    if not all(WNID.fullmatch(wnid) for wnid in names):
        return []
    from timm.data import ImageNetInfo  # imports torch

    descriptions = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    wanted = _normal(name)
    return [
        number
        for wnid, number in names.items()
        if wanted in {_normal(word) for word in descriptions.get(wnid, "").split(",")}
    ]


def _normal(word: str) -> str:
    return " ".join(word.replace("_", " ").lower().split())


def _shown(number: int, table: ClassTable) -> str:
    return f"{number} ({short_name(table.names[number])})" if table.names else str(number)
