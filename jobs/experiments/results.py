"""What an experiment found: a table over seeds, the curves, and the page that compares the runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from pipeline.report.page import write_report
from pipeline.runs.evaluations import EVALUATIONS
from pipeline.storage.files import open_url, write_atomic
from schemas.report import ReportConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Distances = dict[str, dict[int, list[float]]]
"""Of each arm at each step, one for each seed that has come so far."""
MAX_RUNS = 32
"""On one page."""


def write_outcome(work: Path, runs: Sequence[str], facts: Mapping[str, Any]) -> Path:
    """``outcome.json``, ``.md`` and ``.png`` and ``report.html`` in ``work``, of the runs there
    are; returns the second's path."""
    distances = read_distances(work / "runs", runs, facts["evaluation"])
    values = {"facts": facts, "frechet_distances": distances}
    _write(work / "outcome.json", json.dumps(values, indent=1) + "\n")
    text = as_table(distances, facts)
    _write(work / "outcome.md", text)
    draw(distances, work / "outcome.png", facts["reference"]["held_out_fid"])
    folders = tuple(str(work / "runs" / name) for name in runs if (work / "runs" / name).is_dir())
    write_report(ReportConfig(runs=folders[:MAX_RUNS], html=str(work / "report.html")))
    return work / "outcome.md"


def read_distances(folder: Path, runs: Sequence[str], of: Mapping[str, Any]) -> Distances:
    """From the evaluations of runs named ``ARM-seedN`` that say ``of``: somebody may have recorded
    others beside them."""
    found: Distances = {}
    for name in runs:
        path = folder / name / EVALUATIONS
        arm = name.rpartition("-seed")[0]
        steps = found.setdefault(arm, {})
        if path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            own = [row for row in rows if _says(row, of)]
            for step, fid in {int(row["step"]): float(row["fid"]) for row in own}.items():
                steps.setdefault(step, []).append(fid)
    return found


def as_table(distances: Distances, facts: Mapping[str, Any]) -> str:
    """Markdown: one row for each arm, the best of every step in bold; ± is the standard deviation
    over seeds."""
    steps = sorted({step for found in distances.values() for step in found})
    best = {
        step: min(statistics.mean(found[step]) for found in distances.values() if step in found)
        for step in steps
    }
    lines = [
        "| arm | seeds | " + " | ".join(f"step {step:,}" for step in steps) + " |",
        "|---|---" + "|---" * len(steps) + "|",
    ]
    for arm, found in distances.items():
        cells = [_cell(found.get(step, []), best[step]) for step in steps]
        seeds = max((len(values) for values in found.values()), default=0)
        lines.append(f"| {arm} | {seeds} | " + " | ".join(cells) + " |")
    reference, teacher = facts["reference"], facts["teacher"]["knn_held_out"]
    known = ", ".join(f"{name} {value:.1%}" for name, value in teacher.items())
    return "\n".join(
        [
            *lines,
            "",
            f"Fréchet distance on the judge's features, {reference['samples']} samples; so many "
            f"held-out real images have {reference['held_out_fid']:.2f}.",
            f"Teacher, k-NN on held-out images: {known}. Judge, accuracy on them: "
            f"{facts['judge']['held_out_accuracy']:.1%}. Autoencoder: "
            f"{facts['autoencoder']['psnr_db']:.1f} dB. Device: {facts['device']}, torch "
            f"{facts['torch']}.",
            "",
        ]
    )


def draw(distances: Distances, path: Path, floor: float) -> None:
    """Distance over steps, one line for each arm, the range over seeds behind it."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for arm, found in distances.items():
        if not found:
            continue
        steps = sorted(found)
        means = [statistics.mean(found[step]) for step in steps]
        (line,) = axis.plot(steps, means, marker="o", label=arm)
        lows, highs = [min(found[s]) for s in steps], [max(found[s]) for s in steps]
        axis.fill_between(steps, lows, highs, color=line.get_color(), alpha=0.15)
    shown = axis.get_ylim()
    axis.axhline(floor, color="grey", linestyle=":", label=f"held-out real images: {floor:.1f}")
    axis.set(xlabel="step", ylabel="Fréchet distance (judge's features)")
    axis.set_ylim(shown)  # it may lie far below, and would press the arms together
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.tight_layout()
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)


def _says(row: Mapping[str, Any], of: Mapping[str, Any]) -> bool:
    """Whether a row has all of ``of``, part by part. Rows of earlier versions do not say how their
    samples were drawn: the experiment's own were the only ones then."""
    for key, value in of.items():
        found = row.get(key)
        if isinstance(value, Mapping):
            if found is not None and not (isinstance(found, Mapping) and _says(found, value)):
                return False
        elif found != value:
            return False
    return True


def _cell(values: Sequence[float], best: float) -> str:
    if not values:
        return "-"
    mean = statistics.mean(values)
    text = f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
    return f"**{text}**" if mean == best else text


def _write(path: Path, text: str) -> None:
    filesystem, place = open_url(str(path), what="--work")
    write_atomic(filesystem, place, text.encode())
