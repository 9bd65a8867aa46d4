"""Filesystems for URLs, with timeouts that detect failures in seconds."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel

from pipeline.storage.redaction import redact
from pipeline.storage.retry import retry_limit
from schemas.errors import UserError

CONNECT_SECONDS = 5
READ_SECONDS = 15.0
"""Seconds without data from a server after which a request fails; ``retrying`` repeats it."""

UPLOAD_BYTES_PER_SECOND = 512 << 10
"""Slowest upload that is accepted; a slower one fails."""

CONNECTIONS = 32
PARTS_AT_ONCE = 4
"""Parts of 50 MB that one upload holds in memory at the same time."""

WEIGHTS_WORDS = ("hub", "random", "demo")
"""Values of options for weights that are not a path."""

M = TypeVar("M", bound=BaseModel)

# Names of buckets contain neither ':' nor '@'; ARNs contain colons.
_S3_WITH_CREDENTIALS = re.compile(r"\bs3a?://(?!arn:)[^/]*[:@]")


def open_url(url: str, *, what: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of an fsspec URL and the path on it. ``what`` names the option in errors."""
    retry_limit()  # a wrong value is reported here
    protocols = {part.partition("://")[0] for part in url.split("::")} & {"s3", "s3a"}
    if protocols and _S3_WITH_CREDENTIALS.search(url):
        raise UserError(
            f"{what} '{redact(url)}': credentials do not belong in the URL; set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    options = {protocol: _s3_options(protocol) for protocol in protocols}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError, OSError) as error:
        shown = redact(url)
        raise UserError(f"{what} '{shown}': {redact(str(error))}") from None
    if is_s3(filesystem):
        if not str(path).strip("/"):
            raise UserError(f"{what} '{url}': names no bucket; expected s3://BUCKET/PATH")
        # attempts of s3fs and botocore would multiply with those of ``retrying``, to many minutes
        filesystem.retries = 1
    return filesystem, str(path).rstrip("/") or "/"


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    return isinstance(filesystem, LocalFileSystem)


def is_s3(filesystem: fsspec.AbstractFileSystem) -> bool:
    return "s3" in filesystem.protocol


def upload_options(filesystem: fsspec.AbstractFileSystem, size: int) -> dict[str, float]:
    """Options that limit the seconds of one upload of ``size`` bytes, if the backend has them.

    The read timeout does not, because it begins when the request has been sent.
    """
    if not filesystem.async_impl:
        return {}
    return {"timeout": 2 * READ_SECONDS + size / UPLOAD_BYTES_PER_SECOND}


def absolute_url(url: str) -> str:
    """Make a local path absolute, because workers run in other folders; URLs are unchanged."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def absolute_folder(name: str) -> str:
    """Make the path of an existing folder absolute; hub ids and ``demo`` are unchanged."""
    is_folder = name != "demo" and os.path.isdir(os.path.expanduser(name))
    return absolute_url(name) if is_folder else name


def with_absolute_paths(
    config: M, urls: Sequence[str], *, folders: Sequence[str] = (), weights: Sequence[str] = ()
) -> M:
    """A copy of ``config`` whose local paths are absolute, because Ray workers run in another
    folder. The fields have dotted names; None stays None.

    ``urls`` are paths or URLs, ``folders`` as ``absolute_folder`` takes them, ``weights`` are files
    or one of ``WEIGHTS_WORDS``.
    """
    for name in urls:
        config = _with_changed(config, name, absolute_url)
    for name in folders:
        config = _with_changed(config, name, absolute_folder)
    for name in weights:
        config = _with_changed(config, name, _absolute_weights)
    return config


def _absolute_weights(value: str) -> str:
    return value if value in WEIGHTS_WORDS else absolute_url(value)


def _with_changed(config: Any, name: str, change: Callable[[str], str]) -> Any:
    key, _, rest = name.partition(".")
    value = getattr(config, key)
    if value is None:
        return config
    changed = _with_changed(value, rest, change) if rest else change(value)
    return config.model_copy(update={key: changed})


def _s3_options(protocol: str) -> dict[str, Any]:
    """Options of ``S3FileSystem``; those of the user's fsspec configuration take precedence."""
    configured: dict[str, Any] = dict(fsspec.config.conf.get(protocol, {}))
    config = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "max_pool_connections": CONNECTIONS,
        "retries": {"total_max_attempts": 2, "mode": "standard"},
        "connector_args": {"socket_factory": _socket},
    }
    options = {
        "use_listings_cache": False,  # other processes write to what this one lists
        "max_concurrency": PARTS_AT_ONCE,
    }
    return {
        **options,
        **configured,
        "config_kwargs": {**config, **configured.get("config_kwargs", {})},
    }


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket that fails in seconds, not in 15 minutes, if sent data are not acknowledged because
    the other machine was switched off."""
    family, kind, protocol = address[:3]
    made = socket.socket(family=family, type=kind, proto=protocol)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(READ_SECONDS * 1000))
    return made
