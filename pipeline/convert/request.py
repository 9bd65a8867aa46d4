"""Whether what is asked of a conversion agrees with what lies at its target."""

from __future__ import annotations

import os

from pipeline.storage.files import absolute_url, is_local, open_url
from pipeline.store import Store
from pipeline.store.differences import differences
from schemas.errors import UserError
from schemas.store import Manifest


def check_places(source: Store, target: str) -> None:
    """Raises ``UserError`` where the target's URL leads into the source, or the other way."""
    filesystem, root = open_url(absolute_url(target), what="the target")
    if type(filesystem) is not type(source.filesystem):
        return
    if not is_local(filesystem):
        places = [source.root, root]
    else:
        places = [os.path.realpath(source.root), os.path.realpath(root)]
    a, b = (f"{place.rstrip('/')}/" for place in places)
    if a.startswith(b) or b.startswith(a):
        what = "is the store to convert" if a == b else "lies inside the other store"
        if a != b and a.startswith(b):
            what = "holds the store to convert"
        raise UserError(f"the target '{target}' {what}: name another place")


def check_same_conversion(existing: Store, wanted: Manifest) -> None:
    """Raises ``UserError`` where shards made now would not fit those that the target has."""
    was, now = existing.manifest.model_dump(), wanted.model_dump()
    for values in (was, now):
        values.pop("skipped")  # filled in at the end
        for stream in values["streams"].values():
            stream.pop("tail", None)  # written later
    for path, a, b in differences(was, now):
        raise UserError(
            f"store '{existing.shown_url}' was made with {path} {_short(a)}, this conversion has "
            f"{_short(b)}: name another target, or the same source and options"
        )


def _short(value: object) -> str:
    text = "none" if value is None or value == () else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
