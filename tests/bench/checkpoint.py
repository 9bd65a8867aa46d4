"""Time that a training loses by a checkpoint, and memory, beside another build; and the time until
several workers have written one together."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from tests.bench.options import CheckpointOptions as Options
from tests.bench.report import Heading, Report, Row, Table
from tests.stores import make_random_store

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("timed_run.py")
COLUMNS = (
    ("stall", "s from step to step", ".2f"),
    ("slower", "s lost in the steps that follow", ".2f"),
    ("peak", "GB, peak of the process", ".2f"),
)
RATIO = Heading("ratio", "stall / before", ".3f")


def run(options: Options) -> Report:
    if options.workers > 1:
        return together(options)
    trees = trees_of(options.baseline)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory(prefix="haste-bench-") as scratch:
        store = make_random_store(Path(scratch) / "store")
        config = run_config(options, store.url, 3 * options.every)
        for _ in range(options.rounds):
            for name, tree in trees.items():
                folder = Path(scratch) / f"run{name}"
                timed = timed_run(tree, config, folder, options)
                found[name] += _checkpoints(timed, options.every)
                saved = sum(file.stat().st_size for file in folder.glob("checkpoint-*/*"))
                shutil.rmtree(folder)
    table = Table(f"{options.student}, {saved / 1e9:.2f} GB of state", headings(COLUMNS, RATIO))
    for number in (0, 1):  # the first allocates memory
        row: dict[str, Any] = {"name": ("first checkpoint", "second checkpoint")[number]}
        for name, all_of_it in found.items():
            for key, _, _ in COLUMNS:
                row[key + name] = statistics.median(one[key] for one in all_of_it[number::2])
        table.rows.append(row | ratio(row, "stall"))
    second = table.rows[1]
    return Report(
        {"threads": options.threads, "rounds": options.rounds, "depth": options.depth or "all"},
        [table],
        {"stall_seconds": second["stall"], "stall_over_before": second.get("ratio")},
    )


def _checkpoints(timed: dict[str, Any], every: int) -> list[dict[str, float]]:
    """Times lost by the checkpoints after ``every`` and twice as many steps. The last one, at the
    end of the run, delays nothing."""
    steps: list[list[float]] = timed["steps"]
    gaps = [after[0] - before[1] for before, after in pairwise(steps)]
    usual_gap = statistics.median(gaps[1 : every - 1])
    usual_step = statistics.median(end - begin for begin, end in steps[1:every])
    found = []
    for number in (every, 2 * every):
        following = [end - begin for begin, end in steps[number : number + every]]
        found.append(
            {
                "stall": gaps[number - 1] - usual_gap,
                "slower": sum(following) - len(following) * usual_step,
                "peak": timed["peak"] / 1e9,
            }
        )
    return found


def trees_of(baseline: Path | None) -> dict[str, Path]:
    """Builds to measure, by the suffix of their columns."""
    if baseline is not None and not (baseline / "pipeline").is_dir():
        raise UserError(f"--baseline '{baseline}': not a checkout of this project")
    return {"": ROOT} | ({"_before": baseline} if baseline else {})


def headings(columns: tuple[tuple[str, str, str], ...], *ratios: Heading) -> tuple[Heading, ...]:
    """Each column for this build and for the other."""
    pairs = [
        Heading(key + suffix, title + word, form)
        for suffix, word in (("", ""), ("_before", ", before"))
        for key, title, form in columns
    ]
    return Heading("name", "measured"), *pairs, *ratios


def ratio(row: Row, key: str) -> dict[str, float]:
    return {"ratio": row[key] / row[f"{key}_before"]} if f"{key}_before" in row else {}


def run_config(options: Any, store: str, steps: int) -> dict[str, Any]:
    """A config of small latents, so that a step is short beside the weights' size."""
    return {
        "name": "timed",
        "steps": steps,
        "global_batch": 1,
        "log_every": 100_000,
        "student": {
            "model": options.student,
            "depth": options.depth,
            "latent_size": 8,
            "num_classes": 5,
        },
        "alignment": {"feature_weight": 0, "attention_weight": 0, "termination": None},
        "checkpoint": {"every": options.every, "keep": 1},
        "store": store,
    }


def timed_run(
    tree: Path, config: dict[str, Any], folder: Path, options: Any, *, stop: int = 0
) -> dict[str, Any]:
    """The result of ``timed_run.py`` with the build in ``tree``."""
    values = {"config": config, "folder": str(folder), "threads": options.threads, "stop": stop}
    done = subprocess.run(
        # -P: modules of the script's folder have common names
        [sys.executable, "-P", str(PROGRAM), json.dumps(values)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(options.threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"the run failed in {tree}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def together(options: Options) -> Report:
    """Workers write equal shares of one state, which all have in memory, to this machine's disk."""
    from tests.bench.shared_save import save_shares

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="haste-bench-") as scratch:
        for count in (1, options.workers):
            found = [save_shares(options, count, Path(scratch)) for _ in range(options.rounds)]
            medians = map(statistics.median, zip(*found, strict=True))
            keys = ("seconds", "cpu_seconds", "bytes")
            rows.append({"name": count, **dict(zip(keys, medians, strict=True))})
            rows[-1]["gigabytes"] = rows[-1].pop("bytes") / 1e9
            rows[-1]["ratio"] = rows[-1]["cpu_seconds"] / rows[0]["cpu_seconds"]
    headings = (
        Heading("name", "workers"),
        Heading("seconds", "s until it is published", ".2f"),
        Heading("cpu_seconds", "CPU s of the busiest worker", ".2f"),
        Heading("gigabytes", "GB of the largest share", ".2f"),
        Heading("ratio", "CPU s / alone", ".3f"),
    )
    about = {"threads": options.threads, "rounds": options.rounds, "depth": options.depth or "all"}
    return Report(about, [Table(options.student, headings, rows)], {"ratio": rows[1]["ratio"]})
