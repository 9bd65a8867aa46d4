"""Tables of numbers as markdown or JSON, with the machine and versions they were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Row = Mapping[str, Any]

VERSIONED = ("torch", "timm", "numpy", "numcodecs", "zarr", "webdataset", "fsspec", "s3fs")


class Heading(NamedTuple):
    """A column of a table."""

    key: str
    """Key of its values in the rows."""
    title: str
    format: str = ""
    """Format specification of its numbers."""


@dataclass
class Table:
    title: str
    headings: Sequence[Heading]
    rows: list[Row] = field(default_factory=list)


@dataclass
class Report:
    about: dict[str, Any]
    """Conditions of the measurement: option values, image counts, ..."""
    tables: list[Table]
    headline: dict[str, float | None] = field(default_factory=dict)
    """Main results; they become keys of the JSON object."""


def machine() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpus": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "python": platform.python_version(),
        **{name: version for name in VERSIONED if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    """None: not installed, as s3fs on a machine without network."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_json(name: str, report: Report) -> dict[str, Any]:
    return {
        "bench": name,
        "machine": machine(),
        "about": report.about,
        **report.headline,
        "tables": {table.title: table.rows for table in report.tables},
    }


def page(report: Report) -> str:
    """The report as markdown."""
    lines = [", ".join(f"{key} {value}" for key, value in machine().items()), ""]
    lines += [f"{key}: {value}" for key, value in report.about.items()]
    lines += [
        f"{key}: {'-' if value is None else format(value, '.4g')}"
        for key, value in report.headline.items()
    ]
    for table in report.tables:
        lines += ["", f"### {table.title}", "", *markdown(table)]
    return "\n".join(lines)


def markdown(table: Table) -> list[str]:
    """Lines of a table, text aligned left, numbers right."""
    cells = [[_cell(row.get(h.key), h.format) for h in table.headings] for row in table.rows]
    titles = [heading.title for heading in table.headings]
    widths = [
        max(len(line[i]) for line in [titles, *cells, ["---"] * len(titles)])
        for i in range(len(titles))
    ]
    texts = [
        all(isinstance(row.get(heading.key), str | None) for row in table.rows)
        for heading in table.headings
    ]

    def line(parts: Sequence[str]) -> str:
        padded = [
            part.ljust(width) if text else part.rjust(width)
            for part, width, text in zip(parts, widths, texts, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if text else "-" * (width - 1) + ":"
        for width, text in zip(widths, texts, strict=True)
    ]
    return [line(titles), line(rule), *(line(row) for row in cells)]


def _cell(value: Any, spec: str) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else format(value, spec)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.machine()
