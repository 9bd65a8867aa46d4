"""The two stores of a conversion, checked without torch."""

from __future__ import annotations

import os

from pipeline.storage.files import absolute_url, is_local, open_url
from pipeline.store import Store
from schemas.convert import ConvertConfig
from schemas.errors import UserError


def open_source(config: ConvertConfig) -> tuple[Store, str]:
    """The store to convert, and the path or URL of the target. Raises ``UserError``."""
    if config.source is None or config.target is None:
        raise UserError("name two stores: the existing one and the one to create")
    source, url = Store.open(config.source), absolute_url(config.target)
    _check_places(source, url)
    return source, url


def _check_places(source: Store, target: str) -> None:
    """Raises ``UserError`` when one of the two stores would lie at or inside the other."""
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
