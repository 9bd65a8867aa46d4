"""The section of ``tests/bench/RESULTS.md`` on GPUs: predictions beside measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEADING = "## On a GPU"
PREDICTED: dict[tuple[str, str], str] = {
    ("machine", "TFLOP/s, bfloat16"): "790",
    ("machine", "TB/s, copy on the GPU"): "3.0",
    ("machine", "GB/s, from pinned memory"): "more than 20",
    ("SiT-XL/2", "ms, Phase II"): "69",
    ("SiT-XL/2", "ms, Phase I"): "72",
    ("SiT-XL/2", "Phase I / Phase II"): "1.04",
    ("SiT-XL/2", "ms of Python"): "15-20",
    ("SiT-XL/2", "GB, peak of Phase I"): "24",
}
"""Values for one H100 by (check, name): arithmetic on the compiled step's matrix products at
550 TFLOP/s and its bytes moved at 3.0 TB/s, with 32 samples of cut ``maps``."""


def section(report: dict[str, Any] | None) -> str:
    """The section for a report of ``run_checks``; None: predictions alone."""
    checks = {} if report is None else report["checks"]
    lines = [HEADING, ""]
    if report is None:
        lines.append("**Predicted, not measured**: no GPU was at hand.")
    else:
        versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        lines.append(f"{report['device']}, {report['date']}, {versions}.")
    lines += [
        "Predictions are for one H100, from matrix products at 550 TFLOP/s and bytes moved at",
        "3.0 TB/s; SiT-XL/2 takes 32 samples of cut `maps`. tests/gpu/README.md has the commands.",
        "",
        "| quantity | predicted | measured |",
        "|---|---:|---:|",
    ]
    for (check, name), value in PREDICTED.items():
        measured = checks.get(check, {}).get("values", {}).get(name)
        shown = "not measured" if measured is None else f"{measured:.4g}"
        lines.append(f"| {check}: {name} | {value} | {shown} |")
    if report is not None:
        lines += ["", "| check | status | seconds | values (limit) |", "|---|---|---:|---|"]
        lines += [_row(name, result) for name, result in checks.items()]
    return "\n".join(lines) + "\n"


def _row(name: str, result: dict[str, Any]) -> str:
    limits = result.get("limits", {})
    values = [
        f"{key} {value:.3g}" + (f" ({limits[key]:g})" if key in limits else "")
        for key, value in result.get("values", {}).items()
        if isinstance(value, int | float) and (name, key) not in PREDICTED
    ]
    if "reason" in result:
        values.append(str(result["reason"]).replace("|", "/").replace("\n", " ")[:160])
    cells = [name, result["status"], str(result.get("seconds", "")), "; ".join(values)]
    return f"| {' | '.join(cells)} |"


def write_section(path: Path, report: dict[str, Any] | None) -> None:
    """Replace the section in the file, or append it."""
    before, found, rest = path.read_text(encoding="utf-8").partition(f"{HEADING}\n")
    _, separator, after = rest.partition("\n## ")
    text = f"{before.rstrip()}\n\n{section(report)}"
    if found and separator:
        text += f"\n## {after}"
    path.write_text(text, encoding="utf-8")
