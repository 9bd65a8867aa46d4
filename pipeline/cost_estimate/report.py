"""A cost estimate as a table and as one JSON object."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cost_estimate.costs import (
    GIGA,
    HOUR,
    ONLINE,
    TERA,
    Cost,
    DeviceRates,
    ImageFlops,
    Scenario,
    cheapest_online,
    recommended,
)
from pipeline.cost_estimate.device_rates import Device
from pipeline.text import describe_bytes, short_number
from schemas.extract import ExtractConfig
from schemas.run import RunConfig

WIDTH = 100
HEADER = (
    ("cut", "codec", "per", "in", "extract", "read per", "teacher,", "hours", "pays", "total"),
    ("", "", "image", "all", "hours", "worker", "of a step", "a run", "from run", "price"),
)
TEXT_COLUMNS = 2  # left-aligned


@dataclass(frozen=True)
class LocalMeasurement:
    """Measured rates of this machine."""

    device: Device
    extraction_hours: dict[str, float]
    """By cut, in the requested codec."""


@dataclass(frozen=True)
class Estimate:
    """Assumptions, counts and costs."""

    config: ExtractConfig
    run: RunConfig
    device: Device
    scenario: Scenario
    flops: ImageFlops
    costs: tuple[Cost, ...]
    local: LocalMeasurement | None
    """None where nothing was timed. Costs are for ``device``, which can be another."""
    notes: tuple[str, ...]

    @property
    def advice(self) -> list[str]:
        return advise(self.costs, self.flops, self.device.rates, self.scenario)


def describe(estimate: Estimate) -> str:
    """Assumptions, table and advice in lines of at most 100 columns."""
    notes = [f"note: {note}" for note in estimate.notes]
    lines = [*_wrapped(_assumptions(estimate)), "", *_table(estimate), ""]
    return "\n".join([*lines, *_wrapped([" ".join(estimate.advice), *notes])])


def as_json(estimate: Estimate) -> dict[str, Any]:
    """Counts are integers; shares are of a vanilla step; prices are in the options' currency."""
    flops, device, best = estimate.flops, estimate.device, recommended(estimate.costs)
    values = _rounded(asdict(estimate.scenario))
    return {
        "teacher": estimate.config.teacher.model,
        "student": estimate.run.student.model,
        "device": device.name,
        "device_basis": device.basis,
        "measured_here": None if estimate.local is None else _local_as_json(estimate.local),
        "flops_per_image": {
            "vanilla_step": flops.step,
            "alignment": flops.alignment,
            "teacher": flops.training[ONLINE],
            "autoencoder": flops.autoencoder,
        },
        "flops_per_second": _rates_as_json(device),
        "prices": {price: values.pop(price) for price in ("device_hour", "tb_month")},
        **values,
        "cuts": [_rounded(asdict(cost)) for cost in estimate.costs],
        "recommended": {"cut": best.cut, "codec": best.codec},
        "online_is_better": best.cut == ONLINE,
        "reasons": estimate.advice,
        "notes": list(estimate.notes),
    }


def advise(
    costs: tuple[Cost, ...], flops: ImageFlops, rates: DeviceRates, scenario: Scenario
) -> list[str]:
    """Sentences: the most that a store can save, the recommendation, limits and alternatives."""
    online, best = cheapest_online(costs), recommended(costs)
    run_flops = (
        scenario.images_per_run * flops.step + scenario.aligned_images_per_run * flops.alignment
    )
    share = online.device_hours_per_run / (run_flops / rates.student / HOUR)
    sentences = [
        f"The online teacher takes {100 * online.teacher_share_of_step:,.1f}% of a vanilla step "
        f"and adds {100 * share:,.1f}% to a run: a store saves at most that.",
        _online_advice(online, costs, scenario.runs)
        if best.cut == ONLINE
        else f"Take {best.name}: {short_number(best.cost)} for {_runs(scenario.runs)} "
        f"({short_number(best.cost_once)} once, {short_number(best.cost_per_run)} per run) against "
        f"{short_number(online.cost)} with the online teacher; it {_pays(best)}.",
    ]
    if not best.bandwidth_suffices:
        sentences.append(
            f"The trainer still waits for data: {_read_rate(best)} per worker needed, "
            f"{describe_bytes(scenario.bytes_per_second_per_worker)}/s available."
        )
    cheapest = min(costs, key=lambda cost: cost.cost)
    if not cheapest.candidate:
        sentences.append(
            f"{cheapest.name} would cost {short_number(cheapest.cost)}, with larger errors: "
            f"--codec {cheapest.codec}."
        )
    return sentences


def _online_advice(online: Cost, costs: tuple[Cost, ...], runs: int) -> str:
    text = f"The online teacher is the better buy for {_runs(runs)}"
    stores = [c for c in costs if c.candidate and c.cut != ONLINE]
    if not stores:
        return f"{text}."
    store = min(stores, key=lambda cost: cost.cost)
    return (
        f"{text}: {short_number(online.cost)} against {short_number(store.cost)} for "
        f"{store.name}, which {_pays(store)}."
    )


def _read_rate(cost: Cost) -> str:
    return f"{describe_bytes(cost.read_bytes_per_second_per_worker)}/s"


def _pays(cost: Cost) -> str:
    runs = cost.break_even_runs
    return f"pays from {_runs(runs)}" if runs else "never pays"


def _runs(count: int) -> str:
    return f"{count:,} run{'s' if count != 1 else ''}"


def _assumptions(estimate: Estimate) -> Iterable[str]:
    scenario, flops, run = estimate.scenario, estimate.flops, estimate.run
    if estimate.local is not None and estimate.device.basis == "assumed":
        yield (
            f"no GPU here: costs are for one of {estimate.device.rates.teacher / TERA:g} TFLOP/s "
            "(--plan.tflops); --plan.device cpu prices these cores"
        )
        hours = estimate.local.extraction_hours.items()
        yield (
            f"measured on {_describe_rates(estimate.local.device)}; extraction here would take "
            f"{', '.join(f'{short_number(value)} ({cut})' for cut, value in hours)} hours"
        )
    yield (
        f"{estimate.config.teacher.model} for {run.student.model}, {scenario.images:,} images, "
        f"layers {', '.join(map(str, estimate.config.layers))}; a run aligns for "
        f"{scenario.aligned_images_per_run / scenario.images:,.1f} of "
        f"{scenario.images_per_run / scenario.images:,.1f} epochs"
    )
    yield (
        f"GFLOP per image: teacher {short_number(flops.training[ONLINE] / GIGA)}, vanilla step "
        f"{short_number(flops.step / GIGA)} (+{100 * flops.alignment / flops.step:.1f}% for "
        f"projector and tapped logits), autoencoder {short_number(flops.autoencoder / GIGA)}; "
        f"on {_describe_rates(estimate.device)}"
    )
    yield (
        f"for {_runs(scenario.runs)}, {scenario.months:g} months at {scenario.tb_month:g} per "
        f"TB-month, {scenario.device_hour:g} per device-hour, "
        f"{scenario.bytes_per_second_per_worker / GIGA:g} GB/s per worker; {scenario.encoders:g} "
        f"encoding and {scenario.workers} training devices"
    )


def _describe_rates(device: Device) -> str:
    rates = device.rates
    return (
        f"{device.name}: teacher {rates.teacher / TERA:.3g} TFLOP/s"
        f"{'*' if device.estimated else ''}, training {rates.student / TERA:.3g}, autoencoder "
        f"{rates.autoencoder / TERA:.3g}"
    )


def _table(estimate: Estimate) -> list[str]:
    rows = [*HEADER, *(_row(cost, estimate.device) for cost in estimate.costs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        texts = [
            text.ljust(width) if column < TEXT_COLUMNS else text.rjust(width)
            for column, (text, width) in enumerate(cells)
        ]
        lines.append(" ".join(texts).rstrip())
    if not all(cost.bandwidth_suffices for cost in estimate.costs):
        lines.append("w: the trainer waits for data; hours and price include it.")
    if not all(cost.candidate for cost in estimate.costs):
        lines.append(f"Codecs other than {estimate.config.codec} are for comparison (--codec).")
    return lines


def _row(cost: Cost, device: Device) -> tuple[str, ...]:
    runs = f"{cost.break_even_runs:,}" if cost.break_even_runs else "never"
    estimated = device.estimated and cost.teacher_share_of_step > 0
    return (
        cost.cut + (" (exists)" if cost.exists else ""),
        cost.codec,
        describe_bytes(cost.bytes_per_image),
        describe_bytes(cost.bytes),
        short_number(cost.extraction_hours),
        _read_rate(cost) + (" " if cost.bandwidth_suffices else "w"),
        f"{100 * cost.teacher_share_of_step:,.1f}%{'*' if estimated else ' '}",
        short_number(cost.device_hours_per_run),
        "online" if cost.cut == ONLINE else runs,
        short_number(cost.cost),
    )


def _local_as_json(local: LocalMeasurement) -> dict[str, Any]:
    return {
        "device": local.device.name,
        "flops_per_second": _rates_as_json(local.device),
        "extraction_hours": _rounded(local.extraction_hours),
    }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}


def _rates_as_json(device: Device) -> dict[str, Any]:
    return {
        "teacher": round(device.rates.teacher),
        "student": round(device.rates.student),
        "autoencoder": round(device.rates.autoencoder),
        "teacher_basis": device.teacher_basis,
    }


def _wrapped(paragraphs: Iterable[str]) -> list[str]:
    return [
        line
        for paragraph in paragraphs
        for line in textwrap.wrap(paragraph, WIDTH, subsequent_indent="  ")
    ]
