"""YAML config files with a ``base``, and merging of nested options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.cli.yaml12 import RepeatedKeyError, load_yaml
from schemas.alignment import DEFAULT_KIND
from schemas.errors import UserError, plain_text


def read_yaml(path: str | Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML mapping. Its key ``base`` names a file in the same folder with default values."""
    file = Path(path)
    if file.resolve() in _seen:
        raise UserError(f"{file}: 'base' leads back to this file")
    try:
        values = load_yaml(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: cannot read this config ({error.strerror})") from None
    except RepeatedKeyError as error:
        raise UserError(f"{file}: {plain_text(str(error))}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not YAML: {plain_text(str(error))}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a mapping of options, found {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    return merge(read_yaml(file.parent / str(base), (*_seen, file.resolve())), values)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``base`` whose leaves are overridden by those of ``over``."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            # options of another kind do not apply: only those of ``over`` are used
            old_kind = old.get("kind", DEFAULT_KIND)
            same = value.get("kind", old_kind) == old_kind
            merged[key] = merge(old, value) if same else dict(value)
        else:
            merged[key] = value
    return merged
