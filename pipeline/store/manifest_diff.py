"""Comparison of manifests: refuse new shards that would not fit an existing store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.store.codecs import same_numbers
from pipeline.text import short_value
from schemas.errors import UserError
from schemas.store import Manifest
from schemas.streams import Column

FILLED_IN = ("null", "truncated")
"""Keys of a stream of captions that are written later, or have a check of their own."""


def in_stored_layout(
    columns: Mapping[str, Column], stored: Mapping[str, Column]
) -> dict[str, Column]:
    """The columns, in the layout of ``stored`` where that holds the same numbers: earlier versions
    began stores with ``tokens23``."""
    return {
        name: stored[name]
        if column.codec != stored.get(name, column).codec
        and same_numbers(column.codec, stored[name].codec)
        else column
        for name, column in columns.items()
    }


def check_same_store(saved: Manifest, wanted: Manifest, url: str) -> None:
    """Raises ``UserError`` when shards extracted now would not fit those that a store has. Paths
    and URLs are not compared, because they do not change what the files contain."""
    ignore = ["skipped", "dataset.source", "dataset.empty_classes", "checksum"]
    if not saved.dataset.class_names:  # of an earlier version
        ignore.append("dataset.class_names")
    if None not in (saved.autoencoder.weights_sha256, wanted.autoencoder.weights_sha256):
        ignore.append("autoencoder.name")
    for name in saved.streams:
        ignore += [f"streams.{name}.{key}" for key in ("tail", "teacher.weights", *FILLED_IN)]
        ignore.append(f"streams.{name}.encoder.weights")
        if name not in wanted.streams:
            ignore.append(f"streams.{name}")
    streams = {
        name: stream.model_copy(
            update={"columns": in_stored_layout(stream.columns, saved.streams[name].columns)}
        )
        if name in saved.streams
        else stream
        for name, stream in wanted.streams.items()
    }
    require_equal(
        saved,
        wanted.model_copy(update={"streams": streams}),
        ignore,
        where=f"store '{url}'",
        what="this extraction",
        remedy="use another --store or the same options",
    )


def check_same_conversion(saved: Manifest, wanted: Manifest, url: str) -> None:
    """Raises ``UserError`` when shards converted now would not fit those that the target has.
    Skipped images and tails are not compared, because they are written later."""
    keys = ("tail", *FILLED_IN)
    ignore = ["skipped", *(f"streams.{name}.{key}" for name in saved.streams for key in keys)]
    require_equal(
        saved,
        wanted,
        ignore,
        where=f"store '{url}'",
        what="this conversion",
        remedy="name another target, or the same source and options",
    )


def require_equal(
    saved: Manifest, wanted: Manifest, ignore: list[str], *, where: str, what: str, remedy: str
) -> None:
    """Raises ``UserError`` naming the first difference of two manifests that is not at or below
    one of the dotted paths ``ignore``."""
    for path, old, new in differences(saved.model_dump(), wanted.model_dump(), ignore):
        raise UserError(
            f"{where} was made with {path} {short_value(old)}, {what} has {short_value(new)}: "
            f"{remedy}"
        )


def differences(
    saved: object, wanted: object, ignore: list[str], path: str = ""
) -> Iterator[tuple[str, object, object]]:
    """(dotted path, saved value, wanted value) of all that differs in two dumped models."""
    if path in ignore:
        return
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in sorted(saved.keys() | wanted.keys()):
            child = f"{path}.{key}".lstrip(".")
            yield from differences(saved.get(key), wanted.get(key), ignore, child)
    elif saved != wanted:
        yield path, saved, wanted
