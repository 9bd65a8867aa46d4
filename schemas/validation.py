"""Validation of nested mappings against pydantic models.

An unknown key is an error that suggests the nearest known one; all problems are reported in one
line that names the keys.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from schemas.errors import UserError

M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], values: Mapping[str, Any], *, where: str) -> M:
    """``model(**values)``. Raises ``UserError`` with all problems in one line that names the
    keys."""
    check_keys(model, values, where=where)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{key}: {message}" if key else message)
        raise UserError(f"{where}: {'; '.join(problems)}") from None


def suggest(name: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` for known names with the same last part, else for one that is close
    to ``name``, else an empty text."""
    short = {k.rsplit(".", 1)[-1].lstrip("-"): k for k in known}
    last = name.rsplit(".", 1)[-1].lstrip("-")
    close = [k for k in known if "." not in name and k.endswith(f".{last}")][:3]
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        close = [short[tail] for tail in difflib.get_close_matches(last, list(short), 1, 0.7)]
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def check_keys(
    model: type[BaseModel], values: Mapping[str, Any], *, where: str, at: str = ""
) -> None:
    fields = fields_by_key(model)
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}: unknown key '{at}{key}'{suggest(str(key), list(fields))}")
        members = union_members(fields[key].annotation)
        if isinstance(value, bool) and {int, float} & {*members} and bool not in members:
            raise UserError(f"{where}: {at}{key}: {str(value).lower()} is not a number")
        inner = inner_models(fields[key].annotation)
        if len(inner) == 1 and isinstance(value, Mapping):
            check_keys(inner[0], value, where=where, at=f"{at}{key}.")
        entries = [model for member in members for model in inner_models(_first_argument(member))]
        for number, entry in enumerate(value if entries and isinstance(value, list) else ()):
            if isinstance(entry, Mapping):
                check_keys(entries[0], entry, where=where, at=f"{at}{key}.{number}.")


def _first_argument(annotation: Any) -> Any:
    """The type of the entries of a sequence type; None for a type without arguments."""
    return next(iter(typing.get_args(annotation)), None)


def fields_by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def union_members(annotation: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return union_members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        parts = (union_members(member) for member in typing.get_args(annotation))
        return tuple(member for part in parts for member in part)
    return (annotation,)


def inner_models(annotation: Any) -> list[type[BaseModel]]:
    members = union_members(annotation)
    return [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]


def main_key(model: type[BaseModel]) -> str | None:
    """The key of a table that its name alone sets: ``codec: small`` is ``codec: {name: small}``.
    None for tables without one."""
    return getattr(model, "MAIN_KEY", None)


def with_main_keys(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with tables in place of values of their main keys, so that they can be merged."""
    expanded = dict(values)
    for name, field in fields_by_key(model).items():
        for inner in inner_models(field.annotation):
            value, key = expanded.get(name), main_key(inner)
            if isinstance(value, Mapping):
                expanded[name] = with_main_keys(inner, value)
            elif key is not None and isinstance(value, str):
                expanded[name] = {key: value}
    return expanded
