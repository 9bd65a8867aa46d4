"""Differences of two manifests, and refusal where new shards would not fit a store."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.store import Store
from pipeline.text import short_value
from schemas.errors import UserError
from schemas.store import Manifest


def check_same_store(old: Manifest, new: Manifest, url: str) -> None:
    """Raises ``UserError`` where shards made now would not fit those that a store already has."""
    a, b = old.model_dump(), new.model_dump()
    a["streams"] = {name: stream for name, stream in a["streams"].items() if name in b["streams"]}
    for values in (a, b):  # where files lie is not what they are
        values.pop("skipped")
        values["dataset"].pop("source")
        if values["autoencoder"]["weights_sha256"] is not None:
            values["autoencoder"].pop("name")
        for stream in values["streams"].values():
            if stream["kind"] == "teacher":
                stream.pop("tail")
                stream["teacher"].pop("weights")
    for path, was, now in differences(a, b):
        raise UserError(
            f"store '{url}' was made with {path} {was}, this extraction has {now}: use another "
            "--store or the same options"
        )


def check_same_conversion(existing: Store, wanted: Manifest) -> None:
    """Raises ``UserError`` where shards made now would not fit those that the target has."""
    was, now = existing.manifest.model_dump(), wanted.model_dump()
    for values in (was, now):
        values.pop("skipped")  # filled in at the end
        for stream in values["streams"].values():
            stream.pop("tail", None)  # written later
    for path, a, b in differences(was, now):
        raise UserError(
            f"store '{existing.shown_url}' was made with {path} {short_value(a)}, this "
            f"conversion has {short_value(b)}: name another target, or the same source and options"
        )


def differences(was: object, now: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Dotted path, value here and value there of all that differs in two dumped models."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from differences(was.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif was != now:
        yield path, was, now
