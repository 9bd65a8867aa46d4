"""Costs of updating weights and their averages, fused against plain loops."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeline.models import make_student
from pipeline.models.ema import Ema
from schemas.student import StudentConfig
from tests.bench.options import OptimizerOptions as Options
from tests.bench.report import Heading, Report, Row, Table
from tests.bench.timing import Clock

HEADINGS = (
    Heading("what", "what"),
    Heading("ms", "ms", ".1f"),
    Heading("ratio", "/ plain", ".2f"),
    Heading("ns_per_weight", "ns per weight", ".3f"),
)


def run(options: Options) -> Report:
    torch.set_num_threads(options.threads)
    clock = Clock.of(options.device)
    student = make_student(StudentConfig(model=options.student, depth=options.depth))
    student.to(clock.device)
    weights = sum(parameter.numel() for parameter in student.parameters())
    pairs: dict[str, dict[str, Callable[[], Any]]] = {
        "AdamW": {"plain": _adamw(student), "fused": _adamw(student, fused=True)},
        "EMA": {"plain": _plain_ema(student), "one call": _ema(student)},
    }
    rows: list[Row] = []
    headline: dict[str, float | None] = {}
    for kind, variants in pairs.items():
        times: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(options.rounds + 1):
            for name, call in variants.items():
                seconds = clock.time(call)
                if number:  # the first round warms up
                    times[name].append(seconds)
        plain = times["plain"]
        for name, seconds_of in times.items():
            ratio = statistics.median(a / b for a, b in zip(seconds_of, plain, strict=True))
            middle = statistics.median(seconds_of)
            row = {"what": f"{kind}, {name}", "ms": middle * 1e3, "ratio": ratio}
            rows.append({**row, "ns_per_weight": middle / weights * 1e9})
        headline[f"{kind.lower()}_over_plain"] = rows[-1]["ratio"]
    about = {"device": clock.name, "clock": clock.about, "weights": weights}
    return Report(about, [Table(options.student, HEADINGS, rows)], headline)


def _adamw(student: nn.Module, *, fused: bool = False) -> Callable[[], Any]:
    module = copy.deepcopy(student)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    return torch.optim.AdamW(module.parameters(), lr=1e-4, fused=fused, foreach=False).step


def _ema(student: nn.Module) -> Callable[[], Any]:
    average = Ema(student, 0.9999)
    return lambda: average.update(student)


@torch.no_grad()
def _plain_ema(student: nn.Module) -> Callable[[], Any]:
    """Update of one weight tensor at a time, as in the authors' code."""
    average = copy.deepcopy(student)
    pairs = list(zip(average.parameters(), student.parameters(), strict=True))

    @torch.no_grad()
    def update() -> None:
        for mean, weight in pairs:
            mean.mul_(0.9999).add_(weight, alpha=1 - 0.9999)

    return update
