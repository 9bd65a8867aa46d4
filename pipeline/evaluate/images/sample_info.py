"""What samples say of themselves."""

from __future__ import annotations

import json
import sys
from typing import Any

import fsspec

from pipeline.storage.files import read_at_most
from pipeline.storage.npz import MAX_ABOUT
from schemas.sample import ABOUT_FILE, SampleAbout


def parse_or_none(values: Any, where: str) -> SampleAbout | None:
    """The JSON beside samples at ``where``; None, and a line on stderr, where it is none of
    ``jobs/sample.py``'s or of another version's. ``{}``, which says nothing, is silently None."""
    about = SampleAbout.parse_or_none(values)
    if about is None and values != {}:
        print(
            f"{where}: what it says of itself is not what jobs/sample.py writes: passed over",
            file=sys.stderr,
        )
    return about


def about_folder(
    filesystem: fsspec.AbstractFileSystem, root: str, where: str
) -> SampleAbout | None:
    """The same of a folder of pictures that holds an ``about.json``. Raises ``StorageError``."""
    data = read_at_most(filesystem, f"{root}/{ABOUT_FILE}", MAX_ABOUT + 1)
    try:
        values = json.loads(data) if len(data) <= MAX_ABOUT else None
    except (ValueError, RecursionError):
        values = None
    return parse_or_none(values, where)
