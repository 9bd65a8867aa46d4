"""A cost estimate as a table and as one JSON object."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cost_estimate.costs import GIGA, ONLINE, TERA, Cost, ImageFlops, Scenario, cheapest
from pipeline.cost_estimate.device_rates import Device
from pipeline.cost_estimate.memory import CAPACITIES, StepMemory
from pipeline.text import describe_bytes, describe_hours, short_number
from schemas.extract import ExtractConfig
from schemas.run import RunConfig

WIDTH = 100
HEADER = (
    ("cut", "codec", "per", "in", "extrac-", "read per", "teacher,", "added", "cheaper", "total"),
    ("", "", "image", "all", "tion", "worker", "of a step", "to a run", "from run", "cost"),
)
NARROW_HEADER = ("cut", "codec", "size", "added to a run", "total cost")
LEGEND = "Codecs other than that of --codec are for comparison."
WAITS = "*: the trainer waits for data."


@dataclass(frozen=True)
class Estimate:
    """Assumptions, counts and costs."""

    config: ExtractConfig
    run: RunConfig
    device: Device
    scenario: Scenario
    flops: ImageFlops
    costs: tuple[Cost, ...]
    notes: tuple[str, ...]
    memory: StepMemory | None = None
    """Memory of a training step; None: not counted."""


def describe(estimate: Estimate, currency: str = "USD", *, wide: bool = False) -> str:
    """Assumptions, table and advice in lines of at most 100 columns: five columns and one sentence,
    or all with ``wide``."""
    notes = [f"note: {note}" for note in estimate.notes]
    advice = advise(estimate.costs, estimate.scenario, currency)
    memory = [] if estimate.memory is None else ["", *_memory(estimate.memory)]
    shown = " ".join(advice) if wide else advice[VERDICT]
    more = [] if wide else ["(--wide: all columns and counts)"]
    assumptions = _assumptions(estimate, currency, wide=wide)
    table = _table(estimate, currency) if wide else _narrow_table(estimate, currency)
    paragraphs = [*assumptions, "", *table, "", shown, *notes, *more, *memory]
    return "\n".join(textwrap.fill(p, WIDTH, subsequent_indent="  ") for p in paragraphs)


def as_json(estimate: Estimate, currency: str = "USD") -> dict[str, Any]:
    """Counts are integers; shares are of a vanilla step; prices are in the options' currency."""
    flops, device = estimate.flops, estimate.device
    best = cheapest(estimate.costs)
    scenario = _rounded(asdict(estimate.scenario))
    return {
        "teacher": estimate.config.teacher.model,
        "student": estimate.run.student.model,
        "device": device.name,
        "device_basis": device.basis,
        "flops_per_image": {
            "vanilla_step": flops.step,
            "alignment": flops.alignment,
            "teacher": flops.training[ONLINE],
            "autoencoder": flops.autoencoder,
        },
        "flops_per_second": {
            k: round(getattr(device.rates, k)) for k in ("teacher", "student", "autoencoder")
        },
        "prices": {price: scenario.pop(price) for price in ("device_hour", "tb_month")}
        | {"currency": currency},
        **scenario,
        "cuts": [_rounded(asdict(cost)) for cost in estimate.costs],
        "recommended": {"cut": best.cut, "codec": best.codec},
        "online_is_better": best.cut == ONLINE,
        "reasons": advise(estimate.costs, estimate.scenario, currency),
        "notes": list(estimate.notes),
        **({} if estimate.memory is None else {"memory": estimate.memory.as_json()}),
    }


VERDICT = 1
"""Place of the recommendation among the sentences of ``advise``."""


def advise(costs: Sequence[Cost], scenario: Scenario, currency: str = "USD") -> list[str]:
    """Sentences: the most that a store can save, the recommendation, limits and alternatives."""
    best, lowest = cheapest(costs), min(costs, key=lambda cost: cost.cost)
    online, store = cheapest(costs, online=True), cheapest(costs, online=False)
    verdict = f"Recommended: {store.name}"
    if best.cut == ONLINE:
        verdict = f"The online teacher is cheaper than {store.name}"
    runs = store.break_even_runs
    # A store that costs more per run, but less once, is cheaper until the runs add up.
    never = "cheaper for few runs only" if store.cost < online.cost else "never cheaper"
    pays = never if runs is None else f"cheaper from run {runs:,} on"
    sentences = [
        f"The online teacher takes {100 * online.teacher_share_of_step:,.1f}% of a vanilla step: "
        "a store saves at most this share.",
        f"{verdict}: {scenario.runs:,} run(s) cost {short_number(store.cost)} {currency} with the "
        f"store, which is {pays}, and {short_number(online.cost)} {currency} with the online "
        "teacher.",
    ]
    if not best.bandwidth_suffices:
        sentences.append(
            f"The trainer still waits for data: {_read_rate(best)} per worker needed, "
            f"{describe_bytes(scenario.bytes_per_second_per_worker)}/s available."
        )
    if not lowest.candidate:
        sentences.append(
            f"{lowest.name} would cost {short_number(lowest.cost)} {currency}, with larger errors: "
            f"--codec {lowest.codec}."
        )
    return sentences


def _memory(memory: StepMemory) -> list[str]:
    size = describe_bytes
    parts = {
        "weights": memory.weights,
        "their average": memory.averages,
        "AdamW": memory.optimizer,
        "gradients": memory.gradients,
        "the teacher's tail": memory.teacher_tail,
        "weights in the autocast dtype": memory.casts,
        "CUDA": memory.gpu_context,
    }
    fixed = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
    fits = ", ".join(f"{memory.largest_micro_batch(gb)} ({gb} GB)" for gb in CAPACITIES)
    compiled = ", compiled" if memory.compiled else ""
    return [
        f"GPU memory of a worker in Phase I: {size(memory.fixed)} ({fixed}), and per sample of a "
        f"forward pass {size(memory.kept_per_sample)} for the backward pass{compiled}, "
        f"{size(memory.targets_per_sample)} of targets and {size(memory.passing_per_sample)} in "
        f"passing: {size(memory.peak(memory.micro_batch))} for this run's {memory.micro_batch} "
        "samples",
        f"largest --workers.micro-batch that fits: {fits}; counted, not measured on a GPU (on "
        "CPUs the count is 0 to 10% above a step's peak)",
    ]


def _assumptions(estimate: Estimate, currency: str, *, wide: bool) -> list[str]:
    scenario, flops, device = estimate.scenario, estimate.flops, estimate.device
    lines = []
    if device.basis == "assumed":
        lines = [
            f"no GPU here: costs assume one of {device.rates.teacher / TERA:g} TFLOP/s "
            "(--plan.tflops); --plan.device cpu estimates this CPU"
        ]
    counts = (
        f"GFLOP per image: teacher {short_number(flops.training[ONLINE] / GIGA)}, vanilla step "
        f"{short_number(flops.step / GIGA)}, alignment {short_number(flops.alignment / GIGA)}, "
        f"autoencoder {short_number(flops.autoencoder / GIGA)}; on {_describe_rates(device)}"
    )
    return [
        *lines,
        f"{estimate.config.teacher.model} for {estimate.run.student.model}, "
        f"{scenario.images:,} images; aligned for "
        f"{short_number(scenario.aligned_images_per_run / scenario.images)} of "
        f"{short_number(scenario.images_per_run / scenario.images)} epochs",
        *([counts] if wide else []),
        f"{scenario.runs:,} run(s), {scenario.months:g} months at {scenario.tb_month:g} {currency} "
        f"per TB-month, {scenario.device_hour:g} {currency} per device-hour; "
        f"{scenario.bytes_per_second_per_worker / GIGA:g} GB/s per worker, "
        f"{scenario.encoders:g} encoding and {scenario.workers} training devices",
    ]


def _describe_rates(device: Device) -> str:
    rates = device.rates
    return (
        f"{device.name}: teacher {rates.teacher / TERA:.3g} TFLOP/s, "
        f"training {rates.student / TERA:.3g}, autoencoder {rates.autoencoder / TERA:.3g}"
    )


def _narrow_table(estimate: Estimate, currency: str) -> list[str]:
    header = (*NARROW_HEADER[:-1], f"{NARROW_HEADER[-1]}, {currency}")
    rows = [header, *map(_narrow_row, estimate.costs)]
    return _aligned(rows, [] if _reads_suffice(estimate) else [WAITS])


def _narrow_row(cost: Cost) -> tuple[str, ...]:
    return (
        cost.cut + (" (exists)" if cost.exists else ""),
        cost.codec,
        describe_bytes(cost.bytes),
        describe_hours(cost.device_hours_per_run) + (" " if cost.bandwidth_suffices else "*"),
        short_number(cost.cost),
    )


def _reads_suffice(estimate: Estimate) -> bool:
    return all(cost.bandwidth_suffices for cost in estimate.costs)


def _table(estimate: Estimate, currency: str) -> list[str]:
    units = (*HEADER[1][:-1], f"cost, {currency}")
    rows = [HEADER[0], units, *map(_row, estimate.costs)]
    return _aligned(rows, [LEGEND if _reads_suffice(estimate) else f"{WAITS} {LEGEND}"])


def _aligned(rows: Sequence[tuple[str, ...]], legend: list[str]) -> list[str]:
    """Rows whose first two columns begin, and whose others end, in the same place."""
    cut, codec, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        " ".join(
            [row[0].ljust(cut), row[1].ljust(codec), *map(str.rjust, row[2:], widths)]
        ).rstrip()
        for row in rows
    ]
    return [*lines, *legend]


def _row(cost: Cost) -> tuple[str, ...]:
    pays = f"{cost.break_even_runs:,}" if cost.break_even_runs else "never"
    return (
        cost.cut + (" (exists)" if cost.exists else ""),
        cost.codec,
        describe_bytes(cost.bytes_per_image),
        describe_bytes(cost.bytes),
        describe_hours(cost.extraction_hours),
        _read_rate(cost) + (" " if cost.bandwidth_suffices else "*"),
        f"{100 * cost.teacher_share_of_step:,.1f}%",
        describe_hours(cost.device_hours_per_run),
        "online" if cost.cut == ONLINE else pays,
        short_number(cost.cost),
    )


def _read_rate(cost: Cost) -> str:
    return f"{describe_bytes(cost.read_bytes_per_second_per_worker)}/s"


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
