"""Classification of storage errors, and advice on permanent ones."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from http.client import IncompleteRead

from pipeline.storage.redaction import redact
from schemas.errors import plain_text


class Fault(Enum):
    """Meaning of an exception for the caller of a storage operation."""

    MISSING = auto()
    """The file does not exist; callers often expect that."""
    TRANSIENT = auto()
    """A retry may help."""
    PERMANENT = auto()
    """A retry does not help; the user must act."""
    NOT_STORAGE = auto()
    """Not an error of storage, but of this software."""


_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        # a restarted server may have lost a multipart upload: begin another
        "InvalidPart",
        "NoSuchUpload",
        "OperationAborted",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "XAmzContentSHA256Mismatch",
    }
)
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 520, 522, 524, 529})
_TRANSIENT_TYPES = (ConnectionError, TimeoutError, IncompleteRead, socket.gaierror)
_TRANSIENT_SERVICE_TYPES = {
    "botocore.exceptions": (
        "ConnectionError",
        "HTTPClientError",
        "IncompleteReadError",
        "ChecksumError",
        "FlexibleChecksumError",
    ),
    "botocore.parsers": ("ResponseParserError",),
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
}
"""Names of types by module: only ``s3://`` and ``http://`` URLs need these packages."""
_TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,  # a network mount whose server is down
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.EREMOTEIO,
        errno.ESTALE,
    }
)
_STORAGE_SERVICE_TYPES = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
}


def fault_of(error: BaseException) -> Fault:
    """Classify ``error``, from any backend."""
    code, status = _answer(error)
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS:
        return Fault.TRANSIENT
    if isinstance(error, FileNotFoundError):
        return Fault.PERMANENT if code == "NoSuchBucket" else Fault.MISSING
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return Fault.PERMANENT
    if isinstance(error, _TRANSIENT_TYPES) or _is_one_of(error, _TRANSIENT_SERVICE_TYPES):
        return Fault.TRANSIENT
    if status is not None:
        return Fault.PERMANENT
    if isinstance(error, OSError):
        return Fault.TRANSIENT if error.errno in _TRANSIENT_ERRNOS else Fault.PERMANENT
    return Fault.PERMANENT if _is_one_of(error, _STORAGE_SERVICE_TYPES) else Fault.NOT_STORAGE


def is_beyond_the_end(error: BaseException) -> bool:
    """True if the service answered that a file ends before the requested range."""
    code, status = _answer(error)
    return status == 416 or code in {"InvalidRange", "416"}


def is_precondition_failed(error: BaseException) -> bool:
    """True if a conditional write was refused because of its condition. s3fs raises
    ``FileExistsError`` only where the answer names the condition, which most servers leave out."""
    code, status = _answer(error)
    return isinstance(error, FileExistsError) or status == 412 or code == "PreconditionFailed"


def is_unsupported(error: BaseException) -> bool:
    """True if the backend or its service does not know the operation."""
    code, status = _answer(error)
    unknown = isinstance(error, NotImplementedError | TypeError)
    return unknown or status == 501 or code == "NotImplemented"


def reason_of(error: BaseException) -> str:
    """The error's message on one line, without credentials."""
    return plain_text(redact(str(error)))[:300] or type(error).__name__


def suggest_fix(error: BaseException) -> str:
    """Advice to the user on a permanent error."""
    code, status = _answer(error)
    if code == "NoSuchBucket":
        return "create the bucket or correct the URL"
    missing = ("NoCredentialsError", "PartialCredentialsError")
    if _is_one_of(error, {"botocore.exceptions": missing}):
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, PermissionError) or status in {401, 403}:
        return "check the credentials and their permissions"
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return "free space there and run the same command again"
    return "correct that and run the same command again"


def _is_one_of(error: BaseException, types: Mapping[str, Sequence[str]]) -> bool:
    """True if ``error`` has a type of one of these modules, by name. A module that is not loaded
    has raised nothing."""
    return any(
        isinstance(error, getattr(sys.modules[module], name, ()))
        for module, names in types.items()
        if module in sys.modules
        for name in names
    )


def _answer(error: BaseException) -> tuple[str, int | None]:
    """Error code and HTTP status of the service's response; s3fs stores it in the error's cause."""
    for name in ("status", "status_code", "code"):  # aiohttp, Azure, Google
        status = getattr(error, name, None)
        if isinstance(status, int) and 400 <= status < 600:
            return "", status
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return code, int(code) if status is None and code.isdigit() else status
        cause = cause.__cause__
    return "", None
