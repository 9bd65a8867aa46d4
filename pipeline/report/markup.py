"""HTML that is escaped by construction: text becomes markup only through ``tag``."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable

from pipeline.text import MAX_TEXT, shortened
from schemas.errors import escaped

VOID = frozenset({"br", "img", "meta", "wbr"})


class Html(str):
    """Text that is markup already. Made here alone, and of what the project itself says."""


Child = str | int | float | None | Iterable["Child"]


def tag(name: str, *children: Child, **attributes: str | None) -> Html:
    """One element. Children that are no ``Html`` are text and escaped, as attributes are; those
    that are None are left out. ``class_`` and ``aria_label`` become ``class`` and ``aria-label``.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: Child) -> Html:
    """Several nodes, one behind the other."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int | float):
        return Html(_text(str(children)))
    return Html("".join(join(child) for child in children))


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], **attributes: str) -> Html:
    """A table in a box that scrolls sideways; the first cell of a row is its heading."""
    lines = []
    for first, *others in (list(row) for row in rows):
        cells = (tag("td", cell) for cell in others)
        lines.append(tag("tr", tag("th", first, scope="row"), cells))
    top = tag("thead", tag("tr", (tag("th", cell, scope="col") for cell in head)))
    return tag("div", tag("table", top, tag("tbody", lines)), class_="scroll", **attributes)


def image(data: bytes, kind: str, alt: str) -> Html:
    """A picture inside the page. In an ``img`` an SVG runs no script and fetches nothing."""
    encoded = base64.b64encode(data).decode()
    return Html(f'<img alt="{_text(alt, 4 * MAX_TEXT)}" src="data:{kind};base64,{encoded}">')


def breakable(name: str) -> list[Child]:
    """A dotted name that may be broken at its joints, and better there than elsewhere."""
    parts = re.split(r"(?<=[._/])", shortened(name))
    return [node for part in parts for node in (part, tag("wbr"))][:-1]


def _text(text: str, longest: int = 2 * MAX_TEXT) -> str:
    return html.escape(escaped(shortened(text, longest)))
