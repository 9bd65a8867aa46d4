"""CPU work of a sampling step: noise, copies and conversions, with a student of no cost."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from tests.bench.checkouts import HERE, run_in
from tests.bench.options import SamplingOptions as Options
from tests.bench.report import Heading, Report, Table

HEADINGS = (
    Heading("build", "build"),
    Heading("caller_ms", "caller CPU ms", ".3f"),
    Heading("wall_ms", "wall ms", ".3f"),
    Heading("bare_ms", "arithmetic ms", ".3f"),
    Heading("mb", "peak MB", ".0f"),
    Heading("of_baseline", "caller / baseline", ".3f"),
    Heading("wall_of_baseline", "wall / baseline", ".2f"),
)
CHILD = Path(__file__).with_name("sampling_child.py")


def run(options: Options) -> Report:
    """*Caller*: CPU time of the thread that gives the device its work, without the steps' own
    arithmetic on the state, which a GPU does; *wall* likewise."""
    builds = {"this": HERE}
    if options.baseline is not None:
        builds["baseline"] = options.baseline.resolve()
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in builds}
    for _ in range(options.rounds):
        for name, checkout in builds.items():
            arguments = [str(CHILD), str(options.batch), str(options.steps)]
            measured[name].append(run_in(checkout, arguments))
    sums = {one["sum"] for rounds in measured.values() for one in rounds}
    if len(sums) > 1:
        raise UserError(f"the builds draw other latents: their sums are {sorted(sums)}")
    rows: list[dict[str, Any]] = [
        {"build": name, **{k: statistics.median(one[k] for one in rounds) for k in rounds[0]}}
        for name, rounds in measured.items()
    ]
    headline: dict[str, float | None] = {"caller_ms": rows[0]["caller_ms"]}
    if options.baseline is not None:
        for key, ratio in (("caller_ms", "of_baseline"), ("wall_ms", "wall_of_baseline")):
            pairs = zip(measured["this"], measured["baseline"], strict=True)
            rows[0][ratio] = statistics.median(new[key] / old[key] for new, old in pairs)
            headline[ratio] = rows[0][ratio]
    about = {"batch": options.batch, "steps": options.steps, "rounds": options.rounds}
    return Report(about, [Table("one step of the SDE sampler", HEADINGS, rows)], headline)
