"""Time and memory of answers of commands, and the time until a command has its first result."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from tests.bench.options import CommandsOptions as Options
from tests.bench.report import Heading, Report, Row, Table

ROOT = Path(__file__).parents[2]
ANSWERS = (
    "-m pipeline.extract --help",
    "-m pipeline.extract --sorce images",
    "-m pipeline.extract --dataset folder --source {0}/missing --store {0}/store",
    "-m pipeline.extract --plan --help",
    "-m pipeline.convert --help",
    "-m pipeline.inspect --help",
    "-m pipeline.inspect {0}/missing",
    "-m pipeline.report --help",
    "jobs/train_haste.py --help",
    "jobs/train_haste.py --config {0}/missing.yaml",
    "jobs/train_haste.py --store {0}/missing",
    "jobs/sample.py --help",
    "jobs/sample.py --png {0}/a.png --checkpoint {0}/missing",
    "jobs/evaluate.py --help",
    "jobs/export.py --help",
    "jobs/demo.py --help",
    "jobs/experiments/matrix.py --help",
    "jobs/pretrain/self_distill.py --help",
    "-m tests.bench step --help",
)
EXTRACT = "-m pipeline.extract --dataset demo --shard-size 8 --batch-size 8 --actors 1 --store {0}"
TRAIN = "jobs/train_haste.py --config jobs/configs/demo.yaml --log-every 1 --store {0} --output {1}"
ALL_IMAGES = ("--shard-size", "64")
MARK = "HASTE_BENCH_MARK"
"""Variable of the environment that all processes of a measured command inherit, Ray's too."""
MAX_SECONDS = 300.0
"""Wait for a first result."""

ANSWER_HEADINGS = (
    Heading("command", "command"),
    Heading("seconds", "s", ".2f"),
    Heading("cpu_seconds", "CPU s", ".2f"),
    Heading("megabytes", "MB", ".0f"),
    Heading("seconds_before", "s before", ".2f"),
    Heading("cpu_seconds_before", "CPU s before", ".2f"),
    Heading("megabytes_before", "MB before", ".0f"),
    Heading("ratio", "CPU ratio", ".3f"),
)
START_HEADINGS = (
    Heading("command", "until the first"),
    Heading("seconds", "s", ".1f"),
    Heading("cpu_seconds", "CPU s of all processes", ".1f"),
    Heading("seconds_before", "s before", ".1f"),
    Heading("cpu_seconds_before", "CPU s before", ".1f"),
    Heading("ratio", "ratio", ".2f"),
    Heading("cpu_ratio", "CPU ratio", ".2f"),
)


def run(options: Options) -> Report:
    if options.baseline is not None and not (options.baseline / "pipeline").is_dir():
        raise UserError(f"--baseline '{options.baseline}': not a checkout of this project")
    trees = {"": ROOT} | ({"_before": options.baseline} if options.baseline else {})
    commands = [command for command in ANSWERS if options.only in command]
    with tempfile.TemporaryDirectory(prefix="haste-bench-") as scratch:
        answers = [_answer(command, trees, Path(scratch), options) for command in commands]
        starts = _starts(trees, Path(scratch), options) if options.starts else []
    tables = [Table("answers", ANSWER_HEADINGS, answers)]
    if starts:
        tables.append(Table("first results", START_HEADINGS, starts))
    worst = {
        f"{key}_max": max(row[key] for row in answers)
        for key in ("seconds", "megabytes")
        if answers
    }
    for name, row in zip(("image", "step"), starts, strict=False):
        worst[f"first_{name}_over_before"] = row.get("ratio")
    return Report({"rounds": options.rounds}, tables, worst)


def _answer(command: str, trees: dict[str, Path], scratch: Path, options: Options) -> Row:
    """Medians over rounds in each of which every tree answers once."""
    found: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, tree in trees.items():
            for key, value in _measure(tree, command.format(scratch).split()).items():
                found.setdefault(key + name, []).append(value)
    medians = {key: statistics.median(values) for key, values in found.items()}
    row: dict[str, Any] = {"command": command.format("DIR"), **medians}
    return row | _ratio(row, "cpu_seconds")


def _ratio(row: Row, key: str) -> Row:
    return {"ratio": row[key] / row[f"{key}_before"]} if f"{key}_before" in row else {}


def _measure(tree: Path, arguments: list[str]) -> dict[str, float]:
    began = time.perf_counter()
    process = _start(tree, arguments)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 2):
        raise UserError(f"{' '.join(arguments)} ended with {process.returncode} in {tree}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "megabytes": usage.ru_maxrss / 1024}


def _start(tree: Path, arguments: list[str], **more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), **more},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _starts(trees: dict[str, Path], scratch: Path, options: Options) -> list[Row]:
    image: dict[str, Any] = {"command": "encoded shard of 8 images"}
    step: dict[str, Any] = {"command": "training step"}
    for name, tree in trees.items():  # each tree reads its own
        extraction = _start(tree, [*EXTRACT.format(scratch / f"store{name}").split(), *ALL_IMAGES])
        if extraction.wait() != 0:
            raise UserError(f"the store for the training could not be extracted in {tree}")
    found: dict[str, list[tuple[float, float]]] = {}
    for number in range(options.starts):
        for name, tree in trees.items():
            place = scratch / f"{number}{name}"
            command, wanted = EXTRACT.format(place / "store").split(), place / "store"
            result = _until(tree, command, lambda w=wanted: w.rglob("*.json"))
            found.setdefault(f"image{name}", []).append(result)
            command = TRAIN.format(scratch / f"store{name}", place / "runs").split()
            wanted = place / "runs" / "demo"
            result = _until(tree, command, lambda w=wanted: _rows(w))
            found.setdefault(f"step{name}", []).append(result)
            shutil.rmtree(place)
    for kind, row in (("image", image), ("step", step)):
        for name in trees:
            medians = map(statistics.median, zip(*found[f"{kind}{name}"], strict=True))
            row |= dict(zip((f"seconds{name}", f"cpu_seconds{name}"), medians, strict=True))
        row |= {"cpu_ratio": _ratio(row, "cpu_seconds").get("ratio")} | _ratio(row, "seconds")
    return [image, step]


def _rows(folder: Path) -> Iterable[Path]:
    return (path for path in folder.glob("metrics.jsonl") if path.stat().st_size)


def _until(
    tree: Path, arguments: list[str], found: Callable[[], Iterable[Path]]
) -> tuple[float, float]:
    """Seconds from the start of a command until ``found`` yields a file, and CPU seconds of all its
    processes until then; ends the command."""
    mark = uuid.uuid4().hex
    began = time.perf_counter()
    process = _start(tree, arguments, **{MARK: mark})
    try:
        while not any(path.name != "manifest.json" for path in found()):
            if process.poll() is not None or time.perf_counter() - began > MAX_SECONDS:
                raise UserError(f"{' '.join(arguments)} has no first result in {tree}")
            time.sleep(0.01)
        return time.perf_counter() - began, _cpu_seconds(f"{MARK}={mark}".encode())
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _cpu_seconds(mark: bytes) -> float:
    """CPU seconds of the processes with ``mark`` in their environment, and of their ended
    children."""
    ticks = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            if mark in (process / "environ").read_bytes():
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")
