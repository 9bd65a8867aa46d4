"""A training step in both phases against a step of the same student without alignment."""

from __future__ import annotations

import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from pipeline.models.flops import STEP, student_flops
from schemas.student import ModelName
from tests.bench.options import BenchOptions
from tests.bench.peers import peer_step
from tests.bench.report import Heading, Report, Row, Table
from tests.bench.steps import Stepper, batch_of, make_data, make_stepper, run_configs
from tests.bench.timing import Clock, peak_in_child, peak_of

HEADINGS = (
    Heading("step", "step"),
    Heading("ratio", "/ vanilla", ".3f"),
    Heading("spread", "from .. to"),
    Heading("images_per_second", "images/s", ".2f"),
    Heading("tflops", "TFLOP/s of the student", ".2f"),
    Heading("memory", "peak memory / vanilla", ".3f"),
)


class Options(BenchOptions):
    """Step, device and repetitions."""

    student: ModelName = "SiT-B/2"
    """The student, at its published size and with its published alignment."""
    cut: Literal["maps", "qk", "activations", "image"] = "maps"
    """Cut of the teacher in the store (DINOv2-B, 256 px)."""
    batch: int | None = Field(default=None, ge=1)
    """Samples of a step. Default: 4 on a CPU, 128 on a GPU."""
    rounds: int = Field(default=7, ge=1)
    """Rounds in which each step is timed once; ratios are of one round, medians are reported."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of one timing. Default: 1 on a CPU, 10 on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Default: the GPU where one is available."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype, as in training."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Same as compute.compile in training."""
    recipe: tuple[str, ...] = ()
    """Names of configs in jobs/configs, such as sit_b2_irepa: also measure Phase I with their
    alignment, for the same student."""
    plain: bool = True
    """Also measure Phase I with the plain attention loss and optimizer."""
    memory: bool = True
    """Also measure peak memory; on a CPU that takes a new process for each step."""
    depth: int | None = Field(default=None, ge=2)
    """Blocks of the student, for a quick measurement."""
    width: int | None = Field(default=None, ge=4)
    """Width of the student, for a quick measurement."""
    peer: Path | None = None
    """Checkout of the HASTE or REPA repository: also measure its step, with an online teacher, on
    the same shapes."""
    profile: Path | None = None
    """Folder for traces of two steps of each phase, for chrome://tracing."""


def run(options: Options) -> Report:
    torch.set_num_threads(options.threads)
    clock = Clock.of(options.device)
    with tempfile.TemporaryDirectory(prefix="haste-bench-") as folder, ExitStack() as stack:
        data = make_data(Path(folder), options, batch_of(options, clock))
        configs = run_configs(options, data.store)
        peaks: dict[str, float] = {}
        if options.memory:
            for name in ("vanilla", "phase 1"):
                if clock.device.type == "cuda":
                    peaks[name] = peak_of(lambda n=name: make_stepper(n, configs, data, clock))
                else:
                    peaks[name] = peak_in_child(options, name)
        steppers = [make_stepper(name, configs, data, clock) for name in configs]
        if options.peer is not None:
            steppers.append(stack.enter_context(peer_step(options.peer, options, data, clock)))
        times = measure(steppers, options, clock)
        if options.profile is not None:
            for stepper in steppers:
                stepper.trace(options.profile)
        return report(options, clock, data.batch, times, peaks)


def measure(steppers: list[Stepper], options: Options, clock: Clock) -> dict[str, list[float]]:
    """Seconds per step of each stepper, by round; all are warmed up first."""
    steps = options.steps or (10 if clock.device.type == "cuda" else 1)
    for stepper in steppers:
        print(f"warming up: {stepper.name}", file=sys.stderr, flush=True)
        stepper.take(3)
    times: dict[str, list[float]] = {stepper.name: [] for stepper in steppers}
    for _ in range(options.rounds):
        for stepper in steppers:
            times[stepper.name].append(clock.time(lambda s=stepper: s.take(steps)) / steps)
    return times


def report(
    options: Options,
    clock: Clock,
    batch: int,
    times: dict[str, list[float]],
    peaks: dict[str, float],
) -> Report:
    table = Table(f"{options.student}, {options.cut}", HEADINGS)
    flops = STEP * student_flops(run_configs(options, None)["vanilla"].student)
    for name, seconds in times.items():
        table.rows.append(_row(name, seconds, times["vanilla"], batch, flops, peaks))
    ratios: dict[str, Any] = {row["step"]: row["ratio"] for row in table.rows}
    speeds: dict[str, Any] = {row["step"]: row["images_per_second"] for row in table.rows}
    memory = peaks["phase 1"] / peaks["vanilla"] if peaks else None
    about = {"device": clock.name, "clock": clock.about, "batch": batch, "rounds": options.rounds}
    headline = {
        "phase1_over_vanilla": ratios["phase 1"],
        "phase2_over_vanilla": ratios["phase 2"],
        "images_per_second": speeds["phase 2"],
        "memory_phase1_over_vanilla": memory,
    }
    return Report(about, [table], headline)


def _row(
    name: str,
    seconds: list[float],
    vanilla: list[float],
    batch: int,
    flops: int,
    peaks: dict[str, float],
) -> Row:
    ratios = [one / other for one, other in zip(seconds, vanilla, strict=True)]
    speed = batch / statistics.median(seconds)
    return {
        "step": name,
        "ratio": statistics.median(ratios),
        "spread": f"{min(ratios):.2f} .. {max(ratios):.2f}",
        "images_per_second": speed,
        "tflops": speed * flops / 1e12,
        "memory": peaks[name] / peaks["vanilla"] if name in peaks else None,
    }
