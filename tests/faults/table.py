"""Summary of the results: a table as text, or one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from tests.faults.results_log import Result

HEADINGS = ("fault", "tried", "survived", "lost", "seen twice", "seconds to recover")


def as_json(results: Sequence[Result]) -> dict[str, int]:
    """``lost`` and ``duplicated`` count samples."""
    return {
        "faults": len(results),
        "survived": sum(r.survived for r in results),
        "lost": sum(r.lost for r in results),
        "duplicated": sum(r.duplicated for r in results),
        "hung": sum(r.hung for r in results),
    }


def page(results: Sequence[Result]) -> str:
    """Text table: a row for each fault and workload, one for all, and the problems."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: (r.work, r.fault)):
        groups.setdefault(f"{result.fault} ({result.work})", []).append(result)
    groups["all"] = list(results)
    rows = [HEADINGS, *(_row(name, group) for name, group in groups.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines += [f"run {r.run}, {r.fault} ({r.work}): {r.problem}" for r in results if r.problem]
    return "\n".join(lines)


def _row(name: str, results: Sequence[Result]) -> tuple[str, ...]:
    counts = as_json(results)
    seconds = [r.seconds for r in results if r.seconds is not None]
    took = f"{median(seconds):.1f} (at most {max(seconds):.1f})" if seconds else "-"
    numbers = (counts["faults"], counts["survived"], counts["lost"], counts["duplicated"])
    return (name, *map(str, numbers), took)
