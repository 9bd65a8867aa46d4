"""Command-line options that fill a pydantic model.

One rule for every command: a YAML file gives a nested mapping, ``--a.b VALUE`` overrides one leaf,
the model gives types, defaults and help. Numbers on a command line are decimal: ``018`` is 18,
``1_000`` is 1000, ``1e3`` is 1000 where an integer is asked for, ``0x10`` and ``1:30`` are refused.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.cli.config_files import merge, read_yaml
from pipeline.cli.log_setup import LEVELS
from pipeline.cli.yaml12 import RepeatedKeyError, UniqueKeyLoader
from schemas.errors import UserError
from schemas.fields import Repeated
from schemas.validation import (
    M,
    check_keys,
    fields_by_key,
    inner_models,
    main_key,
    suggest,
    union_members,
    validate,
    with_main_keys,
)

BOOLEANS = frozenset({"true", "false", "yes", "no", "on", "off"})
"""Words that an option without a needed value takes from the words behind it."""
OPTION, TEXT = "  ", "      "
"""Indents of the help page: of an option, and of the text below it."""
ASCII_ANY = re.ASCII | re.IGNORECASE


def parse_options(
    model: type[M],
    argv: list[str],
    *,
    command: str,
    about: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    preset_key: str = "",
    positional: str | Sequence[str] = (),
    first: Sequence[str] = (),
) -> M:
    """Build ``model`` from defaults < preset < ``--config FILE`` < ``--option VALUE``.

    ``presets`` maps a value of the option ``preset_key`` to a mapping of defaults, for the table
    of the option (``a`` of ``a.b``). They are defaults: ``model_fields_set`` contains only fields
    that a file or an option sets. ``positional``: names of positional arguments,
    in order; the last may take several words. Prints the help and exits with code 0 on ``--help``,
    which shows the options ``first`` where they are given, and on ``--help-all``; raises
    ``UserError`` for invalid arguments.
    """
    places = [positional] if isinstance(positional, str) else list(positional)
    table, _, _ = preset_key.rpartition(".")
    whole = {name: _nest(table, one) if table else one for name, one in (presets or {}).items()}
    leaves = dict(leaf_fields(model))
    asked = {"-h", "--help", "--help-all"} & set(argv)
    if asked:
        several = {at for at in places if _is_texts(leaves[at].annotation)}
        named = (f"{at.upper()} ..." if at in several else at.upper() for at in places)
        usage = " ".join([command, *named])
        only = () if "--help-all" in asked else first
        texts = {"command": usage, "about": about, "preset_key": preset_key}
        print(help_text(model, presets=whole, only=only, **texts))
        sys.exit(0)
    tables = set(_optional_tables(model))
    overrides: list[tuple[str, Any]] = []  # one table may get several entries
    files: list[str] = []
    for name, value in _split_arguments(argv, leaves, tables, places):
        if name == "config":
            files.append(str(value))
        else:
            overrides.append((name, value))

    given: dict[str, Any] = {}
    for file in files:
        values = read_yaml(file)
        check_keys(model, values, where=file)
        for name, field in leaves.items():
            if _is_mapping(field.annotation):
                _check_words(_look_up(values, name, None), f"{file}: {name}")
        given = merge(given, with_main_keys(model, values))
    for name, value in overrides:
        given = merge(given, with_main_keys(model, _nest(name, value)))
    where = files[-1] if files and not overrides else "options"
    if not presets:
        return validate(model, given, where=where)
    chosen = _look_up(given, preset_key, leaves[preset_key].default)
    return _mark_given(
        validate(model, merge(whole.get(str(chosen), {}), given), where=where), given
    )


def leaf_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every option of ``model`` with its dotted name, including those of nested models. The main
    key of a nested model has the name of that model."""
    for name, field in fields_by_key(model).items():
        inner = inner_models(field.annotation)
        for one in inner:
            main = f"{prefix}{name}.{main_key(one)}"
            for leaf, found in leaf_fields(one, f"{prefix}{name}."):
                yield (f"{prefix}{name}" if leaf == main else leaf), found
        if not inner:
            yield f"{prefix}{name}", field


def _optional_tables(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of nested models that ``--name none`` disables."""
    for name, field in fields_by_key(model).items():
        for inner in inner_models(field.annotation):
            if _accepts(field.annotation, type(None)):
                yield f"{prefix}{name}"
            yield from _optional_tables(inner, f"{prefix}{name}.")


def help_text(
    model: type[BaseModel],
    *,
    command: str,
    about: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    preset_key: str = "",
    only: Sequence[str] = (),
) -> str:
    """The ``--help`` page, from field names, defaults and docstrings. ``presets`` maps values of
    the option ``preset_key`` to other defaults, nested like the model. ``only``: options to show,
    in this order, instead of all."""
    usage = f"{command} [--config FILE.yaml] [--option VALUE ...]"
    lines = [*_wrapped(usage, "usage: ", TEXT), ""]
    for paragraph in about.split("\n\n"):
        lines += [*_wrapped(paragraph), ""]
    lines.append("options:")
    lines += _wrapped(f"--log-level {{{','.join(LEVELS)}}}  (default info)", OPTION, TEXT)
    lines += _wrapped("Lowest level of the messages on stderr.", TEXT, TEXT)
    same_name: dict[str, list[FieldInfo]] = {}  # kinds of one thing share option names
    for name, field in leaf_fields(model):
        same_name.setdefault(name, []).append(field)
    kinds = {name.rpartition(".")[0] for name, fields in same_name.items() if len(fields) > 1}
    for name in only or same_name:
        fields = same_name[name]
        first = fields[0]
        needed = "required by its kind" if name.rpartition(".")[0] in kinds else "required"
        defaults = dict.fromkeys(_show(f.get_default()) for f in fields if not f.is_required())
        default = f"default {' or '.join(defaults)}" if defaults else needed
        others: dict[str, list[str]] = {}
        for chosen, values in (presets or {}).items():
            preset = _look_up(values, name, None)
            if isinstance(preset, Mapping) and not _is_mapping(first.annotation):
                continue  # other parts of a table that the option's name stands for
            if preset is not None and _show(preset) not in defaults:
                others.setdefault(_show(preset), []).append(chosen)
        for shown_preset, names in others.items():
            default += f"; with --{_dashed(preset_key)} {' or '.join(names)}: {shown_preset}"
        choices = list(dict.fromkeys(choice for f in fields for choice in _choices(f.annotation)))
        shown = " {" + ",".join(choices) + "}" if choices else ""
        lines += _wrapped(f"--{_dashed(name)}{shown}  ({default})", OPTION, TEXT)
        if first.description:
            lines += _wrapped(" ".join(first.description.split()), TEXT, TEXT)
    if only:
        lines += ["", f"--help-all lists {len(same_name) - len(only)} more options."]
    return "\n".join(lines)


def _wrapped(text: str, indent: str = "", below: str = "") -> list[str]:
    """``text`` in lines of the terminal's width, those after the first indented by ``below``. Words
    are not broken. Into a pipe or file, lines stay whole, so that ``grep`` finds their words."""
    columns = shutil.get_terminal_size((0, 0)).columns
    if not columns:
        return [indent + line for line in text.splitlines()]
    return textwrap.wrap(
        text.replace("\n", " "),
        max(40, columns),
        initial_indent=indent,
        subsequent_indent=below,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _split_arguments(
    argv: list[str], leaves: dict[str, FieldInfo], tables: set[str], positional: list[str]
) -> Iterator[tuple[str, Any]]:
    rest, places = list(argv), list(positional)
    several: list[str] = []  # before, between and after options
    repeated: dict[str, list[str]] = {}
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") and places:
            if _is_texts(leaves[places[0]].annotation):
                several.append(token)
            else:
                yield places.pop(0), token
            continue
        if not token.startswith("--"):
            raise UserError(
                f"unexpected argument '{token}': options look like --name VALUE; quote a VALUE "
                "with spaces, braces or wildcards"
            )
        option, equals, value = token[2:].partition("=")
        name = option.replace("-", "_")
        table, _, entry = name.rpartition(".")
        in_table = table in leaves and _is_mapping(leaves[table].annotation)
        if name != "config" and name not in leaves and name not in tables and not in_table:
            options = [_dashed(leaf) for leaf in [*leaves, "config", "log_level"]]
            hint = suggest(_dashed(option), options).replace("'", "'--", 1)
            raise UserError(f"unknown option --{option}{hint}; --help-all lists them")
        if not equals:
            flag = name in leaves and leaves[name].annotation is bool
            if flag and (not rest or rest[0].lower() not in BOOLEANS):
                value = "true"
            elif not rest or rest[0].startswith("--"):
                raise UserError(f"option --{option} needs a value")
            else:
                value = rest.pop(0)
        if name == "config":
            yield name, value
        elif name in leaves and any(isinstance(mark, Repeated) for mark in leaves[name].metadata):
            repeated.setdefault(name, []).append(value)
            yield name, repeated[name]
        elif name in leaves and _is_texts(leaves[name].annotation):
            texts = [text for text in value.split(",") if text]
            while rest and not rest[0].startswith("--"):
                texts.append(rest.pop(0))
            yield name, texts
        elif name in tables:
            if value.lower() not in {"null", "none"}:
                raise UserError(
                    f"option --{option} takes 'none', or set its parts: --{option}.NAME"
                )
            yield name, None
        elif in_table:
            yield table, {entry: _parse_untyped(value, name)}
        else:
            yield name, _parse_value(value, leaves[name].annotation, name)
    if several:
        yield places[0], several


def _parse_value(text: str, annotation: Any, option: str) -> Any:
    """Convert an argument to the form that pydantic validates for ``annotation``. Raises
    ``UserError`` that names ``option``."""
    if _accepts(annotation, str) and not _accepts(annotation, type(None)):
        return text
    if text.lower() in {"null", "none"} and _accepts(annotation, type(None)):
        return None
    if _accepts(annotation, str):
        return text
    if _takes_words(annotation) and not text.startswith("["):
        return text
    if text.startswith("[{"):  # a list of tables
        return _parse_untyped(text, option)
    if any(_accepts(annotation, kind) for kind in (tuple, list)):
        if re.search(r"\d\s*-\s*\d", text):  # a range such as 7-11, for the model to read
            return text
        if not text.startswith("["):
            return [_parse_number(part, option) for part in text.split(",")]
    if text.startswith("[") or _is_mapping(annotation):
        return _parse_untyped(text, option)
    return _parse_number(text, option)


def _parse_number(text: str, option: str) -> int | float | str:
    """A decimal number, other words as they are. Raises ``UserError`` for NaN."""
    word = text.strip()
    if re.fullmatch(r"[+-]?\d+(_\d+)*", word, re.ASCII):
        return int(word) if len(word) < 400 else text  # Python converts a bounded number of digits
    if re.fullmatch(r"[+-]?(\d+(_\d+)*\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?\.?inf", word, ASCII_ANY):
        return float(word.lower().replace(".inf", "inf"))
    if re.fullmatch(r"[+-]?\.?nan", word, ASCII_ANY):
        raise UserError(f"option --{_dashed(option)}: '{text}' is not a number")
    return text


def _parse_untyped(text: str, option: str) -> Any:
    """A word whose type no model knows: a decimal number, true, false, null, text, or a list or
    mapping of such words in YAML's brackets. Raises ``UserError`` for a word that could be meant
    as a number or as true or false, and is not written as one."""

    class Loader(UniqueKeyLoader):
        """Reader of words of a command line."""

        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            plain = kind is yaml.ScalarNode and implicit[0]
            return "!word" if plain else super().resolve(kind, value, implicit)

    if not text.strip():
        return text
    Loader.add_constructor("!word", lambda loader, node: _parse_word(node.value, option))
    try:
        return yaml.load(text, Loader)
    except RepeatedKeyError as error:
        raise UserError(f"option --{_dashed(option)}: {error}") from None
    except yaml.YAMLError:
        return text


def _parse_word(text: str, option: str) -> Any:
    constants = {"true": True, "false": False, "null": None, "~": None}
    word = text.lower()
    if word in constants:
        return constants[word]
    if word in BOOLEANS:
        raise UserError(
            f"option --{_dashed(option)}: '{text}' may mean true or false: write one of them, or "
            f"'\"{text}\"' for the text"
        )
    if re.fullmatch(r"[+-]?(0[xob][0-9a-f_]+|\d+(:\d+)+(\.\d*)?)", word, re.ASCII):
        raise UserError(
            f"option --{_dashed(option)}: '{text}' is not a decimal number; for the text, write "
            f"'\"{text}\"'"
        )
    return _parse_number(text, option)


def _check_words(values: Any, where: str) -> None:
    """Raises ``UserError`` where values that no model types hold a text such as no, which was false
    in YAML 1.1 and which Python takes for true."""
    inner = values.values() if isinstance(values, Mapping) else values
    for value in inner if isinstance(values, Mapping | list) else ():
        if isinstance(value, str) and value.lower() in BOOLEANS:
            raise UserError(f"{where}: '{value}' is a text in YAML 1.2: write true or false")
        _check_words(value, where)


def _nest(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


def _mark_given(model: M, given: Mapping[str, Any]) -> M:
    """A copy of ``model`` whose ``model_fields_set`` contains only the keys in ``given``."""
    values: dict[str, Any] = {}
    fields_set = set()
    for name, field in type(model).model_fields.items():
        key, value = field.alias or name, getattr(model, name)
        inner = given.get(key, {})
        nested = isinstance(value, BaseModel) and isinstance(inner, Mapping)
        values[key] = _mark_given(value, inner) if nested else value
        if key in given:
            fields_set.add(name)
    return model.model_construct(fields_set, **values)


def _dashed(option: str) -> str:
    return option.replace("_", "-")


def _look_up(values: Mapping[str, Any], name: str, default: Any) -> Any:
    found: Any = values
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return default
        found = found[part]
    return found


def _accepts(annotation: Any, kind: type) -> bool:
    for member in union_members(annotation):
        origin = typing.get_origin(member)
        if origin is typing.Literal:
            if any(isinstance(choice, kind) for choice in typing.get_args(member)):
                return True
        elif (origin or member) is kind:
            return True
    return False


def _is_texts(annotation: Any) -> bool:
    """True for options that take several words: ``--option A B`` or ``--option A,B``."""
    return any(typing.get_args(member) == (str, ...) for member in union_members(annotation))


def _takes_words(annotation: Any) -> bool:
    """True for sequences of numbers or words, whose text the model parses."""
    items = (item for member in union_members(annotation) for item in typing.get_args(member))
    return any(str in (kinds := union_members(item)) and len(kinds) > 1 for item in items)


def _is_mapping(annotation: Any) -> bool:
    return _accepts(annotation, dict)


def _choices(annotation: Any) -> list[str]:
    literals = [m for m in union_members(annotation) if typing.get_origin(m) is typing.Literal]
    return [str(choice) for member in literals for choice in typing.get_args(member)]


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value)
