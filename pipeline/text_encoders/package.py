"""Import of Transformers, which is optional, and access to its files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from pipeline.storage.hub import HubUnreachableError, hub_access, is_hub_id
from schemas.errors import UserError, plain_text


def transformers() -> Any:
    """The package. Raises ``UserError`` where it is not installed."""
    try:
        import transformers as package
    except ImportError:
        raise UserError(
            "captions are encoded through Transformers, which is not installed: pip install "
            "'.[text]', or leave them out with --text.keep none"
        ) from None
    package.utils.logging.disable_progress_bar()
    return package


@contextlib.contextmanager
def loading(place: str, filename: str, option: str) -> Iterator[None]:
    """Let Transformers load from ``place``, a folder or a hub id of which it needs ``filename``.
    Raises ``UserError`` naming ``option``."""
    try:
        if os.path.isdir(place):
            yield
        elif not is_hub_id(place):
            raise UserError(f"{option} '{place}' is neither a folder nor the name of a hub model")
        else:
            with hub_access(place, [filename]):
                yield
    except HubUnreachableError as error:
        raise UserError(
            f"{option} '{place}' is neither a folder nor an available hub model: it {error}"
        ) from None
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = plain_text(str(error))[:200]
        raise UserError(f"{option} '{place}' cannot be loaded ({reason})") from None
