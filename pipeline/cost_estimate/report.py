"""A plan as a page for people and as one JSON object."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.cost_estimate.costs import (
    GIGA,
    TERA,
    Cost,
    Demand,
    Rates,
    Stored,
    Work,
    break_even_runs,
    cost_of,
    full_run_hours,
)
from pipeline.cost_estimate.device_rates import Device
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


ONLINE = "image"
"""The cut whose tail is the whole teacher: the online baseline, whose crops are stored too."""


@dataclass(frozen=True)
class Advice:
    """Every way's cost, cheapest for the given runs, and the reasons."""

    costs: tuple[Cost, ...]
    """In the order in which they were given."""
    best: Cost
    """Of the candidates: no coarser codec is taken for its price alone."""
    reasons: tuple[str, ...]

    @property
    def online_is_better(self) -> bool:
        return self.best.stored.cut == ONLINE


def advise(ways: Sequence[Stored], work: Work, rates: Rates, demand: Demand) -> Advice:
    """``ways`` holds the cut ``image`` at least once, as a candidate."""
    costs = [cost_of(way, work, rates, demand) for way in ways]
    online = min((c for c in costs if c.stored.cut == ONLINE), key=lambda cost: cost.total)
    compared = tuple(_against(cost, online) for cost in costs)
    candidates = [cost for cost in compared if cost.stored.candidate]
    best = min(candidates, key=lambda cost: cost.total)
    reasons = [_ceiling(online, work, rates, demand), _verdict(best, online, candidates, demand)]
    for cut in dict.fromkeys(cost.stored.cut for cost in candidates):
        if cut in (best.stored.cut, ONLINE):
            continue
        other = min((c for c in candidates if c.stored.cut == cut), key=lambda cost: cost.total)
        reasons.append(_comparison(other, best, work, demand))
    if best.waits:
        reasons.append(
            f"Even so the trainer waits: it could use {best.read_needed / GIGA:.2f} GB/s per "
            f"worker and is given {demand.bytes_per_second / GIGA:g}; faster storage would pay."
        )
    cheapest = min(compared, key=lambda cost: cost.total)
    if not cheapest.stored.candidate:
        reasons.append(
            f"{_name(cheapest)} would cost {_money(cheapest.total)}, but stores other numbers: "
            f"--codec {cheapest.stored.codec} if its errors will do."
        )
    return Advice(compared, best, tuple(reasons))


def _against(cost: Cost, online: Cost) -> Cost:
    if cost.stored.cut == ONLINE:
        return cost
    runs = break_even_runs(cost.once, cost.per_run, online.once, online.per_run)
    return replace(cost, break_even_runs=runs or None)


def _ceiling(online: Cost, work: Work, rates: Rates, demand: Demand) -> str:
    hours = full_run_hours(work, rates, demand)
    share = online.run_device_hours / hours
    longer = (
        f"makes a run {1 + share:.1f} times as long"
        if share >= 1
        else (f"lengthens a run by {100 * share:.1f}%")
    )
    return (
        f"The online teacher takes {_of_step(online.teacher_share)} while the alignment lasts and "
        f"{longer}: no store can save more."
    )


def _verdict(best: Cost, online: Cost, costs: Sequence[Cost], demand: Demand) -> str:
    runs = f"{demand.runs} run{'s' if demand.runs != 1 else ''}"
    if best.stored.cut == ONLINE:
        others = [cost for cost in costs if cost.stored.cut != ONLINE]
        text = f"The online teacher is the better buy for {runs}"
        if not others:
            return text + "."
        next_best = min(others, key=lambda cost: cost.total)
        pays = next_best.break_even_runs
        when = f"pays from {_runs(pays)} on" if pays else "never pays"
        return (
            f"{text}: {_money(online.total)} in all, against {_money(next_best.total)} for "
            f"{_name(next_best)}, which {when}."
        )
    pays = best.break_even_runs
    when = f"it pays from {_runs(pays)} on" if pays else "with many more runs it would not pay"
    return (
        f"Take {_name(best)}: {_money(best.total)} for {runs} ({_money(best.once)} once, "
        f"{_money(best.per_run)} a run) against {_money(online.total)} with the online teacher; "
        f"{when}."
    )


def _comparison(other: Cost, best: Cost, work: Work, demand: Demand) -> str:
    """Why not ``other``."""
    parts = []
    least = 0.01 * best.total
    storage = (other.storage_per_month - best.storage_per_month) * demand.months
    extraction = other.once - best.once - storage
    running = demand.runs * (other.per_run - best.per_run)
    if abs(storage) > least:
        parts.append(f"{_money(abs(storage))} {'more' if storage > 0 else 'less'} for storage")
    if abs(extraction) > least:
        word = "more" if extraction > 0 else "less"
        parts.append(f"{_money(abs(extraction))} {word} for extraction")
    if abs(running) > least:
        word = "more" if running > 0 else "less"
        parts.append(f"{_money(abs(running))} {word} in training{_because(other, work)}")
    told = ", ".join(parts) or "the same within 1%"
    return f"{_name(other)}: {told}."


def _because(cost: Cost, work: Work) -> str:
    """What a cut costs in a step."""
    parts = []
    if cost.teacher_share > 0.005:
        blocks = work.tail_blocks[cost.stored.cut]
        what = f"its {blocks} teacher blocks take" if blocks else "its products take"
        parts.append(f"{what} {_of_step(cost.teacher_share)}")
    if cost.waits:
        parts.append(f"waiting for bytes takes {_of_step(cost.wait_share)}")
    return f" ({', '.join(parts)})" if parts else ""


def _runs(count: int) -> str:
    return "the first run" if count == 1 else f"{count:,} runs"


def _name(cost: Cost) -> str:
    stored = cost.stored
    return f"'{stored.cut}' in {stored.codec}" + (" (this store)" if stored.exists else "")


def _of_step(share: float) -> str:
    if share >= 1:
        return f"as long as {share:.1f} vanilla steps"
    return f"{100 * share:.1f}% of a vanilla step"


def _money(value: float) -> str:
    if value and value < 0.1:
        return f"{value:.1g}"  # toys cost next to nothing, but not the same
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"
