"""YAML by the core schema of version 1.2, and without repeated keys.

PyYAML follows version 1.1, in which ``010`` is 8, ``1:30`` is 90, ``1e3`` is text and ``no`` is
false, and lets a later key replace an earlier one of the same name.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_CORE = (  # YAML 1.2.2, section 10.3.2, in the order in which they are tried
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class RepeatedKeyError(yaml.YAMLError):
    """A mapping that has one key twice."""


class UniqueKeyLoader(yaml.SafeLoader):
    """Loader that refuses repeated keys."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping as it is written, before merge keys are replaced by what they name."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise RepeatedKeyError(
                        f"key '{key.value}' is there twice, on lines {lines[key.value]} and {line}"
                    )
                lines[key.value] = line
        return node


class _Loader(UniqueKeyLoader):
    """Loader of the core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Writer that quotes text which either version would read as something else."""


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text.removeprefix("0o"), base)


_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"<<"), ["<"])
_Loader.add_constructor(f"{_TAG}int", _int)
for _name, _pattern, _first in _CORE:
    _characters = ["" if character == "\0" else character for character in _first]
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"{_TAG}{_name}", re.compile(rf"(?:{_pattern})\Z", re.ASCII), _characters
        )


def load_yaml(text: str | bytes) -> Any:
    """The one document in ``text``. Raises ``yaml.YAMLError``."""
    return yaml.load(text, _Loader)


def dump_yaml(values: Any) -> str:
    """``values`` as YAML that both versions read as the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
