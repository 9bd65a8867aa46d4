"""Extraction and training through Ray against plain processes, and the driver's own CPU time.

Each run is a command of its own. Between two points of its fixed work, when all workers are busy,
the wall time and the CPU time of all of its processes are taken: with Ray those of its daemons and
of the driver too. CPU time excludes other programs, so its ratio says something on a busy machine.
There the daemons' constant share of a core weighs more than on an idle one, because the work takes
longer: that share is measured on idle clusters, and `efficiency` counts it for the time that the
work takes where nothing else runs. The ratio of wall times shows waiting too, and needs an idle
machine. A round does all works once; which way comes first alternates from round to round.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.datasets.digits import digits_images
from pipeline.runs.directory import METRICS
from pipeline.runs.metrics import read_metrics
from schemas.errors import UserError
from tests.bench import driver
from tests.bench.options import ScalingOptions as Options
from tests.bench.report import Heading, Report, Row, Table
from tests.bench.scaling_commands import SHARD_SIZE, extraction

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.01
MAX_SECONDS = 900.0
IDLE_SECONDS = 10
TICKS = os.sysconf("SC_CLK_TCK")

HEADINGS = (
    Heading("work", "work"),
    Heading("workers", "workers", "d"),
    Heading("cpu_seconds_plain", "CPU s plain", ".2f"),
    Heading("cpu_seconds_ray", "CPU s Ray", ".2f"),
    Heading("efficiency", "efficiency", ".3f"),
    Heading("spread", "from .. to"),
    Heading("cpu_efficiency", "CPU as taken", ".3f"),
    Heading("wall_efficiency", "wall", ".3f"),
    Heading("daemons", "Ray's daemons, of a core", ".3f"),
    Heading("idle_daemons", "idle", ".3f"),
)
DRIVER_HEADINGS = (
    Heading("encoders", "encoders", "d"),
    Heading("shards", "shards", "d"),
    Heading("cpu_seconds", "CPU s / 1,000 shards", ".2f"),
    Heading("index_cpu_seconds", "index, CPU s / 1,000", ".2f"),
    Heading("shards_per_cpu_second", "shards / CPU s", ".0f"),
    Heading("wall_shards_per_second", "shards / s", ".0f"),
)


class Usage(NamedTuple):
    """Seconds between two points of a run."""

    wall: float
    cpu: float
    """CPU time of all of its processes."""
    daemons: float
    """CPU time of those that are neither the command nor its workers."""


Runs = dict[tuple[str, int], list[tuple[Usage, Usage]]]
"""(work, workers) -> (plain, Ray) of each round."""


def run(options: Options) -> Report:
    tables, headline = [], {}
    if options.workers:
        with tempfile.TemporaryDirectory(prefix="haste-bench-") as folder:
            runs, idle = _rounds(Path(folder), options)
        rows = [_row(*key, pairs, idle[key[1]]) for key, pairs in runs.items()]
        tables.append(Table("workers", HEADINGS, rows))
        for name in ("efficiency", "cpu_efficiency", "wall_efficiency"):
            headline[f"{name}_min"] = min(row[name] for row in rows)
    if options.encoders:
        row = driver.measure(options.encoders, options.shards)
        tables.append(Table("driver", DRIVER_HEADINGS, [row]))
        headline["driver_shards_per_cpu_second"] = row["shards_per_cpu_second"]
    return Report({"rounds": options.rounds, "load average": os.getloadavg()[0]}, tables, headline)


def _rounds(scratch: Path, options: Options) -> tuple[Runs, dict[int, float]]:
    """All runs, and the daemons' share of a core in an idle cluster of so many workers."""
    runs: Runs = {(work, count): [] for count in options.workers for work in options.works}
    idle: dict[int, list[float]] = {count: [] for count in options.workers}

    def measure(work: str, way: str, count: int, number: int) -> Usage:
        folder = scratch / f"{work}-{count}-{number}-{way}"
        folder.mkdir()
        found = _measure(work, way, count, folder, options)
        print(f"{work}, {count} workers, {way}: {found}", file=sys.stderr, flush=True)
        return found

    for number in range(options.rounds):
        for count, shares in idle.items():
            found = measure("idle", "ray", count, number)
            shares.append(found.daemons / found.wall)
        for (work, count), pairs in runs.items():
            ways = ("plain", "ray") if number % 2 == 0 else ("ray", "plain")
            used = {way: measure(work, way, count, number) for way in ways}
            pairs.append((used["plain"], used["ray"]))
    return runs, {count: statistics.median(shares) for count, shares in idle.items()}


def _row(work: str, workers: int, pairs: list[tuple[Usage, Usage]], idle: float) -> Row:
    """Medians over rounds, of ratios within one."""
    free = [efficiency(plain, ray, idle, workers) for plain, ray in pairs]
    return {
        "work": work,
        "workers": workers,
        "cpu_seconds_plain": statistics.median(plain.cpu for plain, _ in pairs),
        "cpu_seconds_ray": statistics.median(ray.cpu for _, ray in pairs),
        "efficiency": statistics.median(free),
        "spread": f"{min(free):.3f} .. {max(free):.3f}",
        "cpu_efficiency": statistics.median(plain.cpu / ray.cpu for plain, ray in pairs),
        "wall_efficiency": statistics.median(plain.wall / ray.wall for plain, ray in pairs),
        "daemons": statistics.median(ray.daemons / ray.wall for _, ray in pairs),
        "idle_daemons": idle,
    }


def efficiency(plain: Usage, ray: Usage, idle: float, workers: int) -> float:
    """CPU time of plain processes over that through Ray, whose daemons' constant share ``idle`` of
    a core counts for the seconds that the work takes on cores of its own."""
    works = ray.cpu - ray.daemons
    serves = max(0.0, ray.daemons - idle * ray.wall)  # the daemons' part that the work asks for
    seconds = works / min(workers, os.cpu_count() or 1)
    return plain.cpu / (works + serves + idle * seconds)


def _measure(work: str, way: str, workers: int, folder: Path, options: Options) -> Usage:
    """Seconds of a run's work between two points."""
    if work == "idle":
        units, first, last = IDLE_SECONDS, 1, 2

        def done() -> int:
            return len(list(folder.glob("idle-*")))
    elif work == "extraction":
        units = -(-len(digits_images(8)[0]) // SHARD_SIZE)
        first, last = 2 * workers, units - 2 * workers

        def done() -> int:
            return len(list((folder / "store" / "commits").glob("shard-*.json")))
    else:
        _make_training_store(folder.parent)
        units, first, last = options.steps, options.steps // 5, options.steps - 2

        def done() -> int:
            rows = read_metrics(folder / "run" / METRICS)
            return max((row["step"] for row in rows if "event" not in row), default=0)

    command = [sys.executable, "-m", "tests.bench.scaling_commands", work, way]
    return _watch([*command, str(workers), str(folder), str(units)], folder, done, first, last)


def _make_training_store(folder: Path) -> None:
    from pipeline.extract.job import extract

    store = folder / "training-store"
    if not store.exists():
        extract(extraction(folder, 1, store.name))


def _watch(
    command: list[str], folder: Path, done: Callable[[], int], first: int, last: int
) -> Usage:
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=log, stderr=log, start_new_session=True
        )
    points: list[Usage] = []
    deadline = time.monotonic() + MAX_SECONDS
    try:
        while len(points) < 2:
            if done() >= (last if points else first):
                points.append(usage(process.pid))
            elif process.poll() is not None or time.monotonic() > deadline:
                end = (folder / "log").read_text()[-2000:]
                raise UserError(f"{' '.join(command)} did not reach {last}: {end}")
            time.sleep(POLL_SECONDS)
        process.wait(timeout=MAX_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Usage(*(after - before for before, after in zip(*points, strict=True)))


def usage(root: int) -> Usage:
    """Use until now by a live process, its descendants and their ended children."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # the name, in parentheses, may hold anything
            values: Any = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(entry.name)] = int(values[1])
        ticks[int(entry.name)] = sum(map(int, values[11:15]))
    tree, size = {root}, 0
    while len(tree) > size:
        size = len(tree)
        tree |= {pid for pid, parent in parents.items() if parent in tree}
    seconds = {pid: ticks[pid] / TICKS for pid in tree if pid in ticks}
    daemons = sum(used for pid, used in seconds.items() if pid != root and not _works(pid))
    return Usage(time.perf_counter(), sum(seconds.values()), daemons)


def _works(pid: int) -> bool:
    """True for the processes that do the work, not Ray's daemons beside them."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(word in title for word in (b"EncoderActor", b"RayTrainWorker"))
