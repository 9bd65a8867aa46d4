"""Whether images that are there already are those that are asked for."""

from __future__ import annotations

from typing import Any

from schemas.errors import UserError
from schemas.sample import SampleAbout

MAY_DIFFER = {"checkpoint", "version"}
"""Where the weights lay, and what drew: the weights' checksum tells whether they are the same."""


def check_same_images(found: Any, wanted: SampleAbout, *, where: str, remedy: str) -> None:
    """Raises ``UserError`` that says in which respects images at ``where``, which say ``found`` of
    themselves, differ from those that are ``wanted``."""
    there = SampleAbout.understood(found)
    if there is None:
        raise UserError(
            f"'{where}' does not say in a way that this version knows what it is; {remedy}"
        )
    one, other = _leaves(there), _leaves(wanted)
    differing = [key for key in other if one[key] != other[key]]
    if differing:
        said = [f"{key} {_short(one[key])} (now {_short(other[key])})" for key in differing]
        if "weights_sha256" in differing:
            said.append(f"they are from --checkpoint {there.checkpoint}")
        raise UserError(f"'{where}' is of other images: {', '.join(said)}; {remedy}")


def are_same_images(one: SampleAbout, other: SampleAbout) -> bool:
    return _leaves(one) == _leaves(other)


def _leaves(about: SampleAbout) -> dict[str, Any]:
    values = about.model_dump(mode="json", exclude=MAY_DIFFER)
    sampler = values.pop("sampler")
    return values | {f"sampler.{key}": value for key, value in sampler.items()}


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
