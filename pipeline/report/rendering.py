"""Templates of the page: all values are escaped and bounded in length."""

from __future__ import annotations

import base64
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report.palette import LIGHT
from pipeline.text import MAX_TEXT, shortened
from schemas.errors import escaped


def render(template: str, **values: Any) -> str:
    """The text of a file of ``templates/``."""
    return _TEMPLATES.get_template(template).render(values)


def run_name(run: int, label: str) -> Markup:
    """A square of a run's colour, followed by its label."""
    swatch = '<i class="swatch" style="background:var(--run{})" aria-hidden="true"></i>'
    return Markup(swatch + "<span>{}</span>").format(run % len(LIGHT), breakable(label))


def breakable(name: str) -> Markup:
    """A dotted name or a path with the places marked at which a line may break."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/])(?!$)", _bounded_text(shortened(name))))


def data_uri(data: bytes, media_type: str) -> Markup:
    """A picture's URI for an ``img``, in which an SVG runs no script and loads no other file."""
    return Markup(f"data:{media_type};base64,{base64.b64encode(data).decode()}")


def _bounded_text(value: Any) -> Any:
    """``value`` as printable text of ``2 * MAX_TEXT`` characters at most, because the files of a
    run are not trusted; markup, which only this module and the templates make, is unchanged."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else escaped(shortened(str(value), 2 * MAX_TEXT))


_TEMPLATES = Environment(
    loader=PackageLoader("pipeline.report"),
    autoescape=True,
    finalize=_bounded_text,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["breakable"] = breakable
