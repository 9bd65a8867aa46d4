"""Which cut to take, and why, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.plan.costs import (
    GIGA,
    Cost,
    Demand,
    Rates,
    Stored,
    Work,
    break_even_runs,
    cost_of,
    full_run_hours,
)

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
