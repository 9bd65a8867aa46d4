"""YAML with a comment above each choice."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

WIDTH = 96


@dataclass
class CommentedOptions:
    """Options of a command by dotted names, each with the reason of its value."""

    title: str
    options: dict[str, tuple[Any, str]] = field(default_factory=dict)

    def set(self, name: str, value: Any, reason: str) -> None:
        self.options[name] = (value, reason)

    def values(self) -> dict[str, Any]:
        """The options, nested."""
        nested: dict[str, Any] = {}
        for name, (value, _) in self.options.items():
            table, *rest = name.split(".")
            inner = nested
            for part in rest:
                inner = inner.setdefault(table, {})
                table = part
            inner[table] = value
        return nested

    def text(self) -> str:
        """The YAML file."""
        lines = [*_comment(self.title, ""), *self._lines(self.values(), "")]
        return "\n".join(lines) + "\n"

    def _lines(self, values: Mapping[str, Any], prefix: str) -> Iterator[str]:
        indent = "  " * prefix.count(".")
        for key, value in values.items():
            name = prefix + key
            if name in self.options:
                yield from _comment(self.options[name][1], indent)
                yield f"{indent}{key}: {_flow(value)}"
            else:
                yield f"{indent}{key}:"
                yield from self._lines(value, f"{name}.")


def _comment(text: str, indent: str) -> list[str]:
    plain = " ".join("".join(c if c.isprintable() else "?" for c in text).split())
    return textwrap.wrap(
        plain, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
    )


def _flow(value: Any) -> str:
    """A value in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n...\n").removesuffix("\n")
