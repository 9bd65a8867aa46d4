"""What the keys and labels of a data set may be: they come from whoever packed it, and a store
hands them on as names of files."""

from __future__ import annotations

import unicodedata

from pipeline.datasets.listing import Listing
from schemas.errors import UserError, plain_text
from schemas.fields import MAX_CLASSES

MAX_KEY_BYTES = 1024
"""In UTF-8; object stores have the same bound on a whole name."""
UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Controls, bytes that were no UTF-8, ends of lines. (``str.isprintable`` also minds the narrow
spaces in the names of a Mac's screenshots.)"""


def check_listing(listing: Listing, shown: str) -> None:
    """Raises ``UserError`` for the first image whose key or label no store can hold. ``shown`` is
    the source as a person may see it."""
    seen: set[str] = set()
    for item in listing.items:
        problem = _problem(item.key)
        if problem is None and item.label >= MAX_CLASSES:
            problem = f"is of class {item.label}; the largest is {MAX_CLASSES - 1}"
        if problem is None and item.key in seen:
            problem = "has a key that another one has, too"
        if problem is not None:
            where = plain_text(f"{shown}/{item.path}".rstrip("/"))
            raise UserError(f"{where}: sample '{short_name(item.key)}' {problem}")
        seen.add(item.key)
    if listing.num_classes > MAX_CLASSES:
        raise UserError(
            f"--source '{shown}' has {listing.num_classes} classes; a store has up to {MAX_CLASSES}"
        )


def short_name(name: str) -> str:
    """As much of a name from a data set as a line can bear."""
    text = plain_text(name)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _problem(key: str) -> str | None:
    if not key.isprintable() and any(unicodedata.category(c) in UNPRINTABLE for c in key):
        return "has a name with control characters or one that is not UTF-8"
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"has a name of more than {MAX_KEY_BYTES} bytes"
    if not key or key.startswith("/") or ".." in key.split("/"):
        return "has a name that leads out of its folder"
    return None
