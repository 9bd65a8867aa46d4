"""Time from a call that resumes a run to the end of its first step, beside another build."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.checkpoint import headings, ratio, run_config, timed_run, trees_of
from tests.bench.options import ResumeOptions as Options
from tests.bench.report import Heading, Report, Table
from tests.stores import make_random_store

COLUMNS = (
    ("loaded", "s to the first step", ".2f"),
    ("stepped", "s to its end", ".2f"),
    ("cpu", "CPU s", ".2f"),
    ("peak", "GB, peak of the process", ".2f"),
)
RATIOS = (
    Heading("ratio", "s to its end / before", ".3f"),
    Heading("cpu_ratio", "CPU s / before", ".3f"),
)


def run(options: Options) -> Report:
    trees = trees_of(options.baseline)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="haste-bench-") as scratch:
        store = make_random_store(Path(scratch) / "store")
        config = run_config(options, store.url, 1)
        for name, tree in trees.items():  # each resumes its own checkpoint
            timed_run(tree, config, Path(scratch) / name, options)
        for _ in range(options.rounds):
            for name, tree in trees.items():
                longer = config | {"steps": 2}
                timed = timed_run(tree, longer, Path(scratch) / name, options, stop=1)
                values = (*timed["steps"][0], timed["cpu_seconds"], timed["peak"] / 1e9)
                for (key, _, _), value in zip(COLUMNS, values, strict=True):
                    found.setdefault(key + name, []).append(value)
    row: dict[str, Any] = {"name": "resumed"}
    row |= {key: statistics.median(values) for key, values in found.items()}
    row |= ratio(row, "stepped")
    row["cpu_ratio"] = ratio(row, "cpu").get("ratio")
    table = Table(options.student, headings(COLUMNS, *RATIOS), [row])
    about = {"threads": options.threads, "rounds": options.rounds, "depth": options.depth or "all"}
    return Report(about, [table], {"seconds": row["stepped"], "over_before": row.get("ratio")})
