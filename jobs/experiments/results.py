"""Results of an experiment: tables, figures and a report, all from one JSON object.

Numbers of an arm are compared with those of the first arm, the baseline, of the same seed: same
weights at the beginning, same samples, same noise. An interval is the central 95% of 2,000 means
of as many seeds, drawn with replacement (percentile bootstrap, Efron 1979); with three seeds it is
little more than the range of the three, and too narrow on average.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.runs.metrics import VALIDATION_LOSS, read_metrics
from pipeline.storage.files import open_url, write_atomic

RESAMPLES, BOOTSTRAP_SEED = 2000, 0
MAX_RUNS = 32  # on one report
VALUES = {
    "frechet": ("Fréchet distance", "{:.2f}"),
    "validation": ("validation loss", "{:.4f}"),
    "agreement": ("class agreement", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
}
"""Measurements of a run by step, with their names and formats; the first two are better lower."""
LOWER = ("frechet", "validation")
"""Measurements for which steps to equal quality are found."""

Run = Mapping[str, Any]
Results = Mapping[str, Any]
Curve = dict[int, float]
Table = tuple[list[str], list[list[str]]]
"""Head and rows."""


def read_run_numbers(run: Path, verdicts: Path) -> dict[str, Any]:
    """Numbers of one run by step, as the results keep them."""
    rows = read_metrics(run / "metrics.jsonl")
    judged = json.loads(verdicts.read_text())["rows"] if verdicts.exists() else {}
    numbers: dict[str, Any] = {
        key: {step: _short(row[key]) for step, row in judged.items()}
        for key in VALUES
        if key != "validation"
    }
    losses = [row for row in rows if row.get("event") == VALIDATION_LOSS]
    numbers["validation"] = {str(row["step"]): _short(row["validation_ema"]) for row in losses}
    prefix = "gradient_cosine_t"
    numbers["cosine"] = {
        str(row["step"]): {
            key.removeprefix(prefix): _short(value)
            for key, value in row.items()
            if key.startswith(prefix)
        }
        for row in rows
        if "gradient_cosine" in row
    }
    ends = [row["step"] for row in rows if row.get("event") == "alignment terminated"]
    return {**numbers, "termination_step": ends[0] if ends else None}


def write_results(folder: Path, results: Results, runs: Sequence[Path]) -> None:
    """Write ``results.json``, ``table.md``, figures and ``report.html`` to ``folder``."""
    from pipeline.report.page import Introduction, write_report  # with matplotlib
    from schemas.report import ReportConfig

    _write(folder / "results.json", json.dumps(results, separators=(",", ":")) + "\n")
    _write(folder / "table.md", tables(results))
    pictures = draw(results, folder)
    if runs:
        shown = tuple(str(run) for run in runs[:MAX_RUNS])
        config = ReportConfig(runs=shown, html=str(folder / "report.html"), attention="none")
        notes = (differences_note(results), *_failures(results))
        all_tables = (final_table(results), differences_table(results), *_alignment_tables(results))
        write_report(config, Introduction("Comparison of the arms", all_tables, notes, pictures))


def tables(results: Results) -> str:
    """Markdown: the arms at the last step, their differences from the baseline, gradient cosines
    and differences that the termination makes."""
    lines = [
        *_markdown(*final_table(results)),
        "",
        differences_note(results),
        "",
        *_markdown(*differences_table(results)),
    ]
    for table in _alignment_tables(results):
        lines += ["", *_markdown(*table)]
    failed = _failures(results)
    return "\n".join([*lines, *([""] if failed else []), *failed, ""])


def final_table(results: Results) -> Table:
    """The arms at the last step."""
    rows = [
        [arm, _seeds_cell(results, arm), *(_mean_cell(results, arm, key) for key in VALUES)]
        for arm in _arms(results)
    ]
    real = results["facts"].get("real_images", {})
    if real:
        count = results["facts"]["images"]["held_out"]
        cells = [_format(key, real.get(key)) for key in VALUES]
        rows.append([f"{count:,} held-out real images", "", *cells])
    return ["arm", "seeds", *(name for name, _ in VALUES.values())], rows


def differences_note(results: Results) -> str:
    """The sentence between the tables."""
    baseline, last = _arms(results)[0], results["steps"]
    return (
        f"At step {last:,}, averaged weights; ± is the standard deviation over seeds. Differences "
        f"from {baseline} of the same seed, with 95% intervals (bootstrap over seeds), and the "
        f"step at which an arm reaches {baseline}'s value of step {last:,}."
    )


def differences_table(results: Results) -> Table:
    """The arms' differences from the baseline, and steps to equal quality."""
    baseline, *others = _arms(results)
    keys = list(VALUES)[:3]
    names = [VALUES[key][0] for key in keys]
    steps = [f"steps to {baseline}'s {VALUES[key][0]}" for key in LOWER]
    rows = []
    for arm in others:
        cells = [_difference_cell(results, baseline, arm, key) for key in keys]
        cells += [_steps_cell(results, baseline, arm, key) for key in LOWER]
        rows.append([arm, *cells])
    return ["arm", *names, *steps], rows


def cosine_table(results: Results) -> Table:
    """Gradient cosines of the arms where they were measured: the lowest and the highest mean over
    seeds and times of one step, and single values below 0."""
    rows = []
    for arm in _arms(results):
        by_step: dict[int, list[float]] = {}
        for run in results["runs"]:
            for step, times in run["cosine"].items() if run["arm"] == arm else ():
                by_step.setdefault(int(step), []).extend(v for v in times.values() if v is not None)
        values = [value for step in by_step for value in by_step[step]]
        if values:
            means = [statistics.fmean(step) for step in by_step.values() if step]
            negative = f"{sum(value < 0 for value in values)} of {len(values)}"
            rows.append([arm, _cosine(min(means)), _cosine(max(means)), negative])
    return ["arm", "lowest mean gradient cosine", "highest mean", "negative values"], rows


def termination_table(results: Results) -> Table:
    """Differences between the arms whose alignment ends and those aligned to the end."""
    keys = list(VALUES)[:3]
    rows = [
        [
            f"{ended} \N{MINUS SIGN} {always}",
            *(_difference_cell(results, always, ended, key) for key in keys),
        ]
        for ended, always in results["pairs"].items()
    ]
    return ["termination", *(VALUES[key][0] for key in keys)], rows


def _alignment_tables(results: Results) -> list[Table]:
    tables = termination_table(results), cosine_table(results)
    return [(head, rows) for head, rows in tables if rows]


def curves(results: Results, arm: str, key: str) -> dict[int, Curve]:
    """Numbers by step of each seed of an arm."""
    return {
        run["seed"]: {int(step): value for step, value in run[key].items() if value is not None}
        for run in results["runs"]
        if run["arm"] == arm
    }


def finals(results: Results, arm: str, key: str) -> dict[int, float]:
    """Numbers at the last step by seed, of the seeds that have one."""
    last = results["steps"]
    found = curves(results, arm, key).items()
    return {seed: curve[last] for seed, curve in found if last in curve}


def bootstrap(
    seeds: Sequence[int], statistic: Callable[[Sequence[int]], float]
) -> tuple[float, float] | None:
    """The central 95% of a statistic of seeds drawn with replacement; None for a single seed. It
    may be infinite."""
    if len(seeds) < 2:
        return None
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    draws = rng.integers(len(seeds), size=(RESAMPLES, len(seeds)))
    values = sorted(statistic([seeds[place] for place in draw]) for draw in draws)
    return values[round(0.025 * (RESAMPLES - 1))], values[round(0.975 * (RESAMPLES - 1))]


def difference(
    results: Results, baseline: str, arm: str, key: str
) -> tuple[float, tuple[float, float] | None] | None:
    """Mean difference from the baseline at the last step over common seeds, and its interval; None
    without a common seed."""
    ours, theirs = finals(results, arm, key), finals(results, baseline, key)
    paired = {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}
    if not paired:
        return None
    interval = bootstrap(list(paired), lambda some: statistics.fmean(paired[seed] for seed in some))
    return statistics.fmean(paired.values()), interval


def steps_to_equal(
    results: Results, baseline: str, arm: str, key: str
) -> tuple[float, tuple[float, float] | None] | None:
    """The step at which the arm's mean curve reaches the baseline's mean at the last step, over
    common seeds, linear between measurements; infinite where it does not. And its interval: means
    over resampled seeds."""
    ours, target = curves(results, arm, key), finals(results, baseline, key)
    seeds = [seed for seed in ours if seed in target and ours[seed]]
    if not seeds:
        return None
    steps = sorted(set.intersection(*(set(ours[seed]) for seed in seeds)))

    def reached(some: Sequence[int]) -> float:
        wanted = statistics.fmean(target[seed] for seed in some)
        means = [statistics.fmean(ours[seed][step] for seed in some) for step in steps]
        return first_crossing(steps, means, wanted)

    return reached(seeds), bootstrap(seeds, reached)


def first_crossing(steps: Sequence[int], values: Sequence[float], wanted: float) -> float:
    """The step at which linearly interpolated values first fall to ``wanted``; inf for never."""
    for number, value in enumerate(values):
        if value <= wanted:
            if not number:
                return float(steps[0])
            above, step = values[number - 1], steps[number - 1]
            return step + (steps[number] - step) * (above - wanted) / (above - value)
    return math.inf


def draw(results: Results, folder: Path) -> list[Path]:
    """``curves.png``: measurements over steps; ``cosine.png``: gradient cosines over steps beside
    the differences between arms whose alignment ends and those aligned to the end. Returns their
    paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = _arms(results)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for arm, key, axis in _each(arms, ("frechet", "agreement"), axes):
        _draw_curves(axis, arm, list(curves(results, arm, key).values()))
    real = results["facts"].get("real_images", {})
    for key, axis in zip(("frechet", "agreement"), axes, strict=False):
        axis.set(xlabel="step", ylabel=VALUES[key][0])
        if key in real:
            axis.axhline(real[key], color="grey", linestyle=":", linewidth=1)
    for arm in arms[1:]:
        _draw_curves(
            axes[2], arm, _paired(results, arms[0], arm, "validation"), index=arms.index(arm)
        )
    axes[2].axhline(0, color="grey", linewidth=1)
    axes[2].set(xlabel="step", ylabel=f"validation loss, difference from {arms[0]}")
    axes[1].set_ylim(0, 1)
    paths = [_save(figure, folder / "curves.png")]

    measured = [arm for arm in arms if any(r["cosine"] for r in results["runs"] if r["arm"] == arm)]
    if not measured:
        return paths
    columns = min(len(measured) + 1, 4)
    rows = math.ceil((len(measured) + 1) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.4 * rows), squeeze=False)
    axes = list(grid.flat)
    for axis in axes[len(measured) + 1 :]:
        axis.remove()
    axes = axes[: len(measured) + 1]
    for arm, axis in zip(measured, axes, strict=False):
        runs = [run["cosine"] for run in results["runs"] if run["arm"] == arm and run["cosine"]]
        times = next(iter(runs[0].values()))
        for number, time in enumerate(times):
            lines = [{int(step): row[time] for step, row in run.items()} for run in runs]
            _draw_curves(axis, f"t = {time}", lines, index=number)
        axis.axhline(0, color="grey", linewidth=1)
        axis.set(title=arm, xlabel="step", ylabel="gradient cosine")
    for number, (ended, always) in enumerate(results["pairs"].items()):
        lines = _paired(results, always, ended, "validation")
        _draw_curves(axes[-1], f"{ended} \N{MINUS SIGN} {always}", lines, index=number)
        ends = [r["termination_step"] for r in results["runs"] if r["arm"] == ended]
        for end in {end for end in ends if end is not None}:
            axes[-1].axvline(end, color="grey", linestyle=":", linewidth=1)
    axes[-1].axhline(0, color="grey", linewidth=1)
    axes[-1].set(title="ended or not", xlabel="step", ylabel="validation loss, difference")
    return [*paths, _save(figure, folder / "cosine.png")]


def _paired(results: Results, baseline: str, arm: str, key: str) -> list[Curve]:
    """Differences by step of each common seed."""
    ours, theirs = curves(results, arm, key), curves(results, baseline, key)
    return [
        {step: value - theirs[seed][step] for step, value in curve.items() if step in theirs[seed]}
        for seed, curve in ours.items()
        if seed in theirs
    ]


def _each(
    arms: Sequence[str], keys: Sequence[str], axes: Sequence[Any]
) -> Iterator[tuple[str, str, Any]]:
    for key, axis in zip(keys, axes, strict=False):
        for arm in arms:
            yield arm, key, axis


def _draw_curves(axis: Any, name: str, lines: Sequence[Curve], index: int | None = None) -> None:
    """Mean over seeds, their range shaded."""
    lines = [line for line in lines if line]
    if not lines:
        return
    steps = sorted(set.intersection(*(set(line) for line in lines)))
    rows = [[line[step] for line in lines] for step in steps]
    colour = {} if index is None else {"color": f"C{index % 10}"}
    (drawn,) = axis.plot(
        steps, [statistics.fmean(row) for row in rows], marker=".", label=name, **colour
    )
    low, high = [min(row) for row in rows], [max(row) for row in rows]
    axis.fill_between(steps, low, high, color=drawn.get_color(), alpha=0.12)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    for axis in figure.axes:
        axis.grid(alpha=0.3)
        if axis.lines and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.tight_layout()
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=100)
    plt.close(figure)
    temporary.replace(path)
    return path


def _arms(results: Results) -> list[str]:
    """Their names, the baseline first."""
    return list(dict.fromkeys(run["arm"] for run in results["runs"]))


def _failures(results: Results) -> list[str]:
    failed = [run for run in results["runs"] if run["failed"]]
    return [f"Failed: {run['arm']}, seed {run['seed']}: {run['failed']}" for run in failed]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _seeds_cell(results: Results, arm: str) -> str:
    runs = [run for run in results["runs"] if run["arm"] == arm]
    failed = sum(run["failed"] is not None for run in runs)
    done = len(finals(results, arm, "frechet"))
    return f"{done} of {len(runs)}" + (f", {failed} failed" if failed else "")


def _mean_cell(results: Results, arm: str, key: str) -> str:
    values = list(finals(results, arm, key).values())
    if not values:
        return "-"
    spread = f" ± {_format(key, statistics.stdev(values))}" if len(values) > 1 else ""
    return _format(key, statistics.fmean(values)) + spread


def _difference_cell(results: Results, baseline: str, arm: str, key: str) -> str:
    found = difference(results, baseline, arm, key)
    if found is None:
        return "-"
    mean, interval = found
    text = _signed(key, mean)
    return text if interval is None else f"{text} [{', '.join(_signed(key, x) for x in interval)}]"


def _steps_cell(results: Results, baseline: str, arm: str, key: str) -> str:
    found = steps_to_equal(results, baseline, arm, key)
    if found is None:
        return "-"
    step, interval = found
    text = _step(step)
    return text if interval is None else f"{text} [{', '.join(map(_step, interval))}]"


def _step(step: float) -> str:
    return "not reached" if math.isinf(step) else f"{step:,.0f}"


def _format(key: str, value: float | None) -> str:
    return "-" if value is None else VALUES[key][1].format(value)


def _signed(key: str, value: float) -> str:
    digits = _format(key, abs(value))
    sign = "+" if value > 0 else "\N{MINUS SIGN}"
    return sign + digits if float(digits) else digits


def _cosine(value: float) -> str:
    return f"{value:z.3f}".replace("-", "\N{MINUS SIGN}")


def _short(value: float | None) -> float | None:
    """Six significant digits, for small files."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _write(path: Path, text: str) -> None:
    filesystem, root = open_url(str(path), what="--output")
    write_atomic(filesystem, root, text.encode())
