"""Results of an experiment: a table over seeds, the curves, and a report that compares the runs."""

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
"""arm -> step -> Fréchet distances, one for each seed evaluated so far"""
MAX_RUNS = 32  # on one report


def write_results(work: Path, runs: Sequence[str], facts: Mapping[str, Any]) -> Path:
    """Write ``outcome.json``, ``outcome.md``, ``outcome.png`` and ``report.html`` to ``work``, with
    the runs that exist; returns the path of ``outcome.md``."""
    distances = read_distances(work / "runs", runs, facts["evaluation"])
    values = {"facts": facts, "frechet_distances": distances}
    _write(work / "outcome.json", json.dumps(values, indent=1) + "\n")
    _write(work / "outcome.md", as_table(distances, facts))
    draw_distances(distances, work / "outcome.png", facts["reference"]["held_out_fid"])
    folders = tuple(str(work / "runs" / name) for name in runs if (work / "runs" / name).is_dir())
    write_report(ReportConfig(runs=folders[:MAX_RUNS], html=str(work / "report.html")))
    return work / "outcome.md"


def read_distances(folder: Path, runs: Sequence[str], evaluation: Mapping[str, Any]) -> Distances:
    """Distances from the evaluations of runs named ``ARM-seedN`` that match ``evaluation``; other
    evaluations of these runs are ignored."""
    distances: Distances = {}
    for name in runs:
        path = folder / name / EVALUATIONS
        steps = distances.setdefault(name.rpartition("-seed")[0], {})
        if path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            own = [row for row in rows if _matches(row, evaluation)]
            for step, fid in {int(row["step"]): float(row["fid"]) for row in own}.items():
                steps.setdefault(step, []).append(fid)
    return distances


def as_table(distances: Distances, facts: Mapping[str, Any]) -> str:
    """Markdown: one row for each arm, the best of every step in bold; ± is the standard deviation
    over seeds."""
    steps = sorted({step for by_step in distances.values() for step in by_step})
    best = {
        step: min(
            statistics.mean(by_step[step]) for by_step in distances.values() if step in by_step
        )
        for step in steps
    }
    lines = [
        "| arm | seeds | " + " | ".join(f"step {step:,}" for step in steps) + " |",
        "|---|---" + "|---" * len(steps) + "|",
    ]
    for arm, by_step in distances.items():
        cells = [_cell(by_step.get(step, []), best[step]) for step in steps]
        seeds = max((len(values) for values in by_step.values()), default=0)
        lines.append(f"| {arm} | {seeds} | " + " | ".join(cells) + " |")
    reference, knn = facts["reference"], facts["teacher"]["knn_held_out"]
    accuracies = ", ".join(f"{name} {value:.1%}" for name, value in knn.items())
    return "\n".join(
        [
            *lines,
            "",
            f"Fréchet distance on the evaluation classifier's features, {reference['samples']} "
            f"samples; as many held-out real images have {reference['held_out_fid']:.2f}.",
            f"Teacher, k-NN on held-out images: {accuracies}. Evaluation classifier, accuracy on "
            f"them: {facts['judge']['held_out_accuracy']:.1%}. Autoencoder: "
            f"{facts['autoencoder']['psnr_db']:.1f} dB. Device: {facts['device']}, torch "
            f"{facts['torch']}.",
            "",
        ]
    )


def draw_distances(distances: Distances, path: Path, floor: float) -> None:
    """Distance over steps: one line for each arm, its range over seeds shaded."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for arm, by_step in distances.items():
        if not by_step:
            continue
        steps = sorted(by_step)
        means = [statistics.mean(by_step[step]) for step in steps]
        (line,) = axis.plot(steps, means, marker="o", label=arm)
        lows, highs = [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps]
        axis.fill_between(steps, lows, highs, color=line.get_color(), alpha=0.15)
    limits = axis.get_ylim()
    axis.axhline(floor, color="grey", linestyle=":", label=f"held-out real images: {floor:.1f}")
    axis.set(xlabel="step", ylabel="Fréchet distance (classifier's features)")
    axis.set_ylim(limits)  # a floor far below the arms would compress their differences
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.tight_layout()
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)


def _matches(row: Mapping[str, Any], evaluation: Mapping[str, Any]) -> bool:
    """True if a row has all values of ``evaluation``, nested ones included. A nested value that the
    row lacks matches: rows of earlier versions have no sampling settings and are the experiment's
    own."""
    for key, expected in evaluation.items():
        value = row.get(key)
        if isinstance(expected, Mapping):
            if value is not None and not (isinstance(value, Mapping) and _matches(value, expected)):
                return False
        elif value != expected:
            return False
    return True


def _cell(values: Sequence[float], best: float) -> str:
    if not values:
        return "-"
    mean = statistics.mean(values)
    text = f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
    return f"**{text}**" if mean == best else text


def _write(path: Path, text: str) -> None:
    filesystem, root = open_url(str(path), what="--work")
    write_atomic(filesystem, root, text.encode())
