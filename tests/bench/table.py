"""All benches of speed in one run: each in a separate process, within a time budget."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch

from tests.bench.options import TableOptions as Options
from tests.bench.report import Heading, Report, Row, Table

HEADINGS = (
    Heading("bench", "bench"),
    Heading("number", "number"),
    Heading("value", "value", ".4g"),
    Heading("seconds", "took s", ".0f"),
)
GPU = (
    # three trainers of 11 GB each, and the activations of one of them, fit into 80 GB
    "step --student SiT-XL/2 --cut maps --batch 32 --plain false",
    "step --student SiT-XL/2 --cut activations --batch 32 --plain false",
    "step --student SiT-B/2 --cut maps --batch 128",
    "step --student SiT-B/2 --cut activations --batch 128 --plain false",
    "attention",
    "optimizer --student SiT-XL/2",
    "extract --images 512",
    "loader",
)
CPU = (
    "step --student SiT-S/2 --cut maps",
    "step --student SiT-B/2 --cut maps",
    "step --student SiT-B/2 --cut activations --plain false",
    "attention",
    "optimizer",
    "extract",
    "loader",
)
TINY = ("optimizer --student SiT-S/2 --depth 1 --rounds 1",)
MIN_SECONDS = 20.0
"""Remaining time below which no further bench is started."""


def run(options: Options) -> Report:
    commands = GPU if torch.cuda.is_available() else CPU
    if options.only == "tiny":
        commands = TINY
    else:
        commands = tuple(command for command in commands if options.only in command)
    began = time.monotonic()
    rows: list[Row] = []
    for command in commands:
        left = options.budget - (time.monotonic() - began)
        if left < MIN_SECONDS:
            rows.append({"bench": command, "number": "no time was left"})
            continue
        words = command.split()
        if options.peer is not None and "maps" in words:
            words += ["--peer", str(options.peer)]
        print(f"{' '.join(words)} (at most {left:.0f} s)", file=sys.stderr, flush=True)
        rows += _run(words, left, options.threads)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"device": device, "budget": options.budget}
    return Report(about, [Table("All benches", HEADINGS, rows)])


def _run(words: list[str], seconds: float, threads: int) -> list[Row]:
    """Headline of one bench and ratios of its rows, or the reason why there are none."""
    name = " ".join(words)
    command = [sys.executable, "-m", "tests.bench", *words, "--threads", str(threads), "--json"]
    start = time.monotonic()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [{"bench": name, "number": "ran out of time", "seconds": seconds}]
    took = time.monotonic() - start
    if done.returncode:
        return [{"bench": name, "number": f"failed with code {done.returncode}", "seconds": took}]
    report = json.loads(done.stdout.splitlines()[-1])
    fixed = {"bench", "machine", "about", "tables"}
    values = {key: value for key, value in report.items() if key not in fixed}
    for table in report["tables"].values():
        for row in table:
            label = next(value for value in row.values() if isinstance(value, str))
            for key in ("ratio", "images_per_second", "memory", "share", "ms"):
                if row.get(key) is not None:
                    values[f"{label}: {key}"] = row[key]
    return [
        {"bench": name if not i else "", "number": key, "value": value, "seconds": None}
        | ({"seconds": took} if not i else {})
        for i, (key, value) in enumerate(values.items())
    ]
