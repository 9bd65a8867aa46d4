"""Keeping the credentials of a URL out of what is written down or shown."""

from __future__ import annotations

import re
from typing import Any

from pipeline.storage.credentials import HIDDEN, without_credentials


def without_secrets(text: str, url: str) -> str:
    """What somebody else said about ``url``, less its credentials: filesystems name buckets and
    paths without the scheme, and with all the rest."""
    for secret in _secrets(url):
        text = text.replace(secret, HIDDEN)
    return without_credentials(text)


def written_down(values: Any) -> Any:
    """A config as plain values, with no credentials in any of its URLs."""
    if isinstance(values, dict):
        return {key: written_down(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [written_down(value) for value in values]
    return without_credentials(values) if isinstance(values, str) else values


def _secrets(url: str) -> list[str]:
    """Parts of a URL that are nobody's business, the longest first."""
    _, scheme, rest = url.partition("://")
    if not scheme:
        return []
    found = []
    user = re.match(r"([^/\s]*)@", rest)
    if user:
        found += [user[1], *user[1].split(":")[1:]]
    _, question, query = rest.partition("?")
    if question:
        found += [query, *(part.partition("=")[2] for part in query.split("&"))]
    return sorted((secret for secret in found if len(secret) > 2), key=len, reverse=True)
