"""A plan as a page for people and as one JSON object."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.plan.advice import ONLINE, Advice
from pipeline.plan.costs import GIGA, TERA, Cost, Demand, Work
from pipeline.plan.rates import Device
from schemas.extract import ExtractConfig
from schemas.run import RunConfig

WIDTH = 100
COLUMNS = (11, -8, 7, 8, 7, 10, 9, 9, 7, 6, 8)
"""Widths; negative where text is set to the left, as in the first column."""
TITLES = {
    "cut": "",
    "codec": "",
    "KB per": "image",
    "in all": "",
    "extract": "hours",
    "read per": "worker",
    "read": "in all",
    "teacher,": "of a step",
    "hours": "a run",
    "pays": "from",
    "cost of": "all runs",
}
"""First and second line of the header."""
LEGEND = (
    "w: the trainer waits for bytes, which hours and cost include. KB is 1000 bytes, with latents."
)


@dataclass(frozen=True)
class Here:
    """This machine, timed."""

    device: Device
    extraction_hours: dict[str, float]
    """By cut, in the chosen codecs."""


@dataclass(frozen=True)
class Plan:
    """Everything that was assumed, counted, timed and concluded."""

    config: ExtractConfig
    run: RunConfig
    device: Device
    demand: Demand
    work: Work
    advice: Advice
    here: Here | None
    """None where nothing was timed. Costs are for ``device``, which may be another."""
    notes: tuple[str, ...]


def describe(plan: Plan) -> str:
    """Lines of at most 100 columns."""
    lines = [*_wrapped(_assumptions(plan)), "", _line([*TITLES]), _line([*TITLES.values()])]
    lines += [_row(cost, plan) for cost in plan.advice.costs]
    lines += ["", LEGEND]
    if not all(cost.stored.candidate for cost in plan.advice.costs):
        lines.append(f"Codecs other than {plan.config.codec} are for comparison (--codec).")
    if any(cost.stored.exists for cost in plan.advice.costs):
        lines.append("=: the store as it is; its extraction is paid for.")
    lines += ["", *_wrapped(plan.advice.reasons)]
    if plan.notes:
        lines += ["", *_wrapped(f"note: {note}" for note in plan.notes)]
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """Counts are integers; shares are of a vanilla step; prices are in the options' currency."""
    demand, work, device = plan.demand, plan.work, plan.device
    best = plan.advice.best
    return {
        "teacher": plan.config.teacher.model,
        "student": plan.run.student.model,
        "device": device.name,
        "device_basis": device.basis,
        "measured_here": None if plan.here is None else _here_as_json(plan.here),
        "flops_per_image": {
            "vanilla_step": work.step,
            "alignment": work.alignment,
            "teacher": work.training[ONLINE],
            "autoencoder": work.autoencoder,
        },
        "flops_per_second": _rates_as_json(device),
        "images": demand.images,
        "aligned_images_per_run": demand.aligned_images,
        "images_per_run": demand.run_images,
        "encoders": round(demand.encoders, 3),
        "workers": demand.trainers,
        "bytes_per_second_per_worker": round(demand.bytes_per_second),
        "prices": {"device_hour": demand.device_hour, "tb_month": demand.tb_month},
        "months": demand.months,
        "runs": demand.runs,
        "cuts": [_cost_as_json(cost, plan) for cost in plan.advice.costs],
        "recommended": {"cut": best.stored.cut, "codec": best.stored.codec},
        "online_is_better": plan.advice.online_is_better,
        "reasons": list(plan.advice.reasons),
        "notes": list(plan.notes),
    }


def _here_as_json(here: Here) -> dict[str, Any]:
    hours = {cut: round(value, 3) for cut, value in here.extraction_hours.items()}
    return {
        "device": here.device.name,
        "flops_per_second": _rates_as_json(here.device),
        "extraction_hours": hours,
    }


def _rates_as_json(device: Device) -> dict[str, Any]:
    return {
        "teacher": round(device.rates.teacher),
        "student": round(device.rates.student),
        "autoencoder": round(device.rates.autoencoder),
        "teacher_basis": device.teacher_basis,
    }


def _cost_as_json(cost: Cost, plan: Plan) -> dict[str, Any]:
    stored = cost.stored
    return {
        "cut": stored.cut,
        "codec": stored.codec,
        "exists": stored.exists,
        "candidate": stored.candidate,
        "bytes_per_image": stored.bytes_per_image,
        "bytes": cost.store_bytes,
        "extraction_device_hours": round(cost.extraction_device_hours, 3),
        "extraction_hours": round(cost.extraction_hours, 3),
        "read_bytes_per_second_per_worker": round(cost.read_needed),
        "read_bytes_per_second": round(cost.read_needed * plan.demand.trainers),
        "bandwidth_suffices": not cost.waits,
        "teacher_flops_per_image": plan.work.training[stored.cut],
        "teacher_share_of_step": round(cost.teacher_share, 6),
        "wait_share_of_step": round(cost.wait_share, 6),
        "device_hours_per_run": round(cost.run_device_hours, 3),
        "storage_cost_per_month": round(cost.storage_per_month, 2),
        "cost_once": round(cost.once, 2),
        "cost_per_run": round(cost.per_run, 2),
        "cost": round(cost.total, 2),
        "break_even_runs": cost.break_even_runs,
    }


def _assumptions(plan: Plan) -> list[str]:
    demand, work, rates = plan.demand, plan.work, plan.device.rates
    run = plan.run
    step = work.step / rates.student
    mark = "*" if plan.device.estimated else ""
    epochs = demand.aligned_images / demand.images
    return [
        *_elsewhere(plan),
        f"{plan.config.teacher.model} for {run.student.model}, {demand.images:,} images, layers "
        f"{', '.join(map(str, plan.config.layers))}; a run aligns for {epochs:,.1f} epochs "
        f"({demand.aligned_images:,} images) of {demand.run_images / demand.images:,.1f}",
        f"on {plan.device.name}: teacher {_short(work.training[ONLINE] / 1e9)} GFLOP per image at "
        f"{rates.teacher / TERA:.3g} TFLOP/s{mark}, vanilla step {_short(work.step / 1e9)} at "
        f"{rates.student / TERA:.3g} ({_short(1 / step)} images/s per worker), projector and "
        f"tapped logits +{100 * work.alignment / work.step:.1f}%, autoencoder "
        f"{_short(work.autoencoder / 1e9)} at {rates.autoencoder / TERA:.3g}",
        f"for {demand.runs} aligned runs, {demand.months:g} months at {demand.tb_month:g} per "
        f"TB-month, {demand.device_hour:g} per device-hour, {demand.bytes_per_second / GIGA:g} "
        f"GB/s per worker; {demand.encoders:g} encoding and {demand.trainers} training devices",
    ]


def _elsewhere(plan: Plan) -> list[str]:
    """Where costs are for an assumed GPU: that they are, and what was timed here."""
    if plan.here is None or plan.device.basis != "assumed":
        return []
    here, rates = plan.here.device, plan.here.device.rates
    hours = ", ".join(f"{_short(h)} ({cut})" for cut, h in plan.here.extraction_hours.items())
    return [
        f"no GPU here: costs are for one of {plan.device.rates.teacher / TERA:g} TFLOP/s "
        "(--plan.tflops); --plan.device cpu prices these cores",
        f"measured on {here.name}: teacher {rates.teacher / TERA:.3g} TFLOP/s"
        f"{'*' if here.estimated else ''}, training {rates.student / TERA:.3g}, autoencoder "
        f"{rates.autoencoder / TERA:.3g}; extracting here would take {hours} hours",
    ]


def _row(cost: Cost, plan: Plan) -> str:
    stored = cost.stored
    if stored.cut == ONLINE:
        pays = "online"
    else:
        pays = "never" if cost.break_even_runs is None else f"{cost.break_even_runs:,}"
    estimated = plan.device.estimated and cost.teacher_share > 0
    cells = (
        f"{stored.cut}{'=' if stored.exists else ''}",
        stored.codec,
        _short(stored.bytes_per_image / 1000),
        _bytes(cost.store_bytes),
        _short(cost.extraction_hours),
        f"{_bytes(cost.read_needed)}/s{'w' if cost.waits else ' '}",
        f"{_bytes(cost.read_needed * plan.demand.trainers)}/s",
        f"{100 * cost.teacher_share:,.1f}%{'*' if estimated else ' '}",
        _short(cost.run_device_hours),
        pays,
        _short(cost.total),
    )
    return _line(cells)


def _line(cells: Sequence[str]) -> str:
    first, *others = zip(cells, COLUMNS, strict=True)
    texts = [first[0].ljust(first[1])]
    texts += [cell.ljust(-width) if width < 0 else cell.rjust(width) for cell, width in others]
    return " ".join(texts).rstrip()


def _bytes(count: float) -> str:
    """Three digits and a unit: 3 to 7 characters."""
    for unit, size in (("TB", TERA), ("GB", GIGA), ("MB", 1e6), ("KB", 1e3)):
        if count >= 0.9995 * size:
            return f"{_short(count / size)} {unit}"
    return f"{count:.0f} B"


def _short(value: float) -> str:
    """Three digits, or all before the point; millions as such, at most 7 characters."""
    if 0 < value < 0.001:
        return f"{value:.1e}"
    if value >= 999_999.5:
        return f"{value / 1e6:,.3g}M" if value < 1e8 else f"{value / 1e6:,.0f}M"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _wrapped(paragraphs: Iterable[str]) -> list[str]:
    return [
        line
        for paragraph in paragraphs
        for line in textwrap.wrap(paragraph, WIDTH, subsequent_indent="  ")
    ]
