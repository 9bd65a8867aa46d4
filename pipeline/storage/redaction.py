"""Removal of credentials from messages and records."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"

_SECRET_NAME = r"(?:secret|token(?!s)|passw(?:or)?d|signature|credential|access_?key|api_?key)"
_SECRET_VARIABLE = re.compile(_SECRET_NAME, re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/\s]*@")
# Secret keys of AWS contain slashes. Text after the colon that is not a port is a password.
_USER_INFO_WITH_SLASH = re.compile(r"(?<=://)[^/\s:@]+:(?!\d{1,5}(?:[/\s\"']|$))[^\s\"']*@")
_BARE_USER_INFO = re.compile(r"(?<![^\s\"'(=])[^\s\"'/:@(=]+:(?!//|:)[^\s\"']+@(?=[\w.-])")
_QUERY = re.compile(r"\?\S*?(?=[\"')>]*(?:\s|$))")
_TAGGED = re.compile(rf"<(?=\w*?{_SECRET_NAME})(\w++)>[^<]*<", re.IGNORECASE)
# NAME=value, 'name': 'value', Name: value; a value runs to its quote, else to the next space. Names
# are tried from their beginning alone, because from each letter of a long text it takes minutes.
_ASSIGNED = re.compile(
    rf"""((?<![\w.-])(?=[\w.-]*?{_SECRET_NAME})[\w.-]++["']?\s*[=:]\s*)("[^"]*"|'[^']*'|(?:Bearer\s+)?[^\s,;&"']+)""",
    re.IGNORECASE,
)
_AUTHORIZATION = re.compile(r"(authorization[\"']?\s*[=:]\s*)[^\n]*", re.IGNORECASE)
_ACCESS_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b")


def redact(text: str) -> str:
    """A URL or an error message without credentials.

    Removed are user names, passwords and queries of URLs, values after names such as
    ``aws_secret_access_key``, and values of credentials in this process's environment.
    """
    for value in _credentials_of_environment():
        text = text.replace(value, HIDDEN)
    text = _USER_INFO.sub("", text)
    if "@" in text:  # without one, each search would read to the end of the text
        text = _USER_INFO_WITH_SLASH.sub("", text)
        text = _BARE_USER_INFO.sub("", text)
    if "://" in text:
        text = _QUERY.sub("", text)
    text = _AUTHORIZATION.sub(rf"\g<1>{HIDDEN}", text)
    text = _TAGGED.sub(rf"<\1>{HIDDEN}<", text)
    text = _ASSIGNED.sub(rf"\g<1>{HIDDEN}", text)
    return _ACCESS_KEY_ID.sub(HIDDEN, text)


def _credentials_of_environment() -> list[str]:
    """Values, longest first, so that one that contains another is replaced as a whole."""
    found = {
        value
        for name, value in os.environ.items()
        # paths and short switches are not secret, and replacing them would garble messages
        if _SECRET_VARIABLE.search(name) and len(value) >= 8 and not os.path.isabs(value)
    }
    return sorted(found, key=len, reverse=True)


def without_secrets(text: str, url: str) -> str:
    """A library's message about ``url`` without its credentials, also where it repeats parts of the
    URL without the scheme."""
    for secret in _secrets(url):
        text = text.replace(secret, HIDDEN)
    return redact(text)


def redacted_config(values: Any) -> Any:
    """A config as plain values, without credentials in its URLs."""
    if isinstance(values, dict):
        return {key: redacted_config(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [redacted_config(value) for value in values]
    return redact(values) if isinstance(values, str) else values


def _secrets(url: str) -> list[str]:
    """Parts of a URL that may be secret, the longest first."""
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
