"""Check the keys and labels of a data set, which are untrusted and become file names in a store."""

from __future__ import annotations

import unicodedata

from pipeline.datasets.listing import Listing
from schemas.errors import UserError, plain_text
from schemas.fields import MAX_CLASSES

MAX_KEY_BYTES = 1024
"""UTF-8 bytes of a key; object stores have the same limit for a complete name."""
UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories of control characters, bytes that are not UTF-8, and line ends.
(``str.isprintable`` would also refuse the narrow spaces in names of macOS screenshots.)"""


def check_listing(listing: Listing, shown: str) -> None:
    """Raises ``UserError`` for the first image whose key or label a store cannot have. ``shown`` is
    the redacted source."""
    seen: set[str] = set()
    for item in listing.items:
        problem = _problem(item.key)
        if problem is None and item.label >= MAX_CLASSES:
            problem = f"is of class {item.label}; the largest is {MAX_CLASSES - 1}"
        if problem is None and item.key in seen:
            problem = "has the key of another sample"
        if problem is not None:
            where = plain_text(f"{shown}/{item.path}".rstrip("/"))
            raise UserError(f"{where}: sample '{short_name(item.key)}' {problem}")
        seen.add(item.key)
    for name in listing.class_names:
        problem = _problem(name)
        if problem is not None:
            raise UserError(f"{shown}: class folder '{short_name(name)}' {problem}")
    if listing.num_classes > MAX_CLASSES:
        raise UserError(
            f"--source '{shown}' has {listing.num_classes} classes; the limit is {MAX_CLASSES}"
        )


def short_name(name: str) -> str:
    """At most 200 characters of an untrusted name, in one line."""
    text = plain_text(name)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _problem(key: str) -> str | None:
    if not key.isprintable() and any(unicodedata.category(c) in UNPRINTABLE for c in key):
        return "has a name with control characters or one that is not UTF-8"
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"has a name of more than {MAX_KEY_BYTES} bytes"
    if not key or key.startswith("/") or ".." in key.split("/"):
        return "has an absolute name or '..' in it"
    return None
