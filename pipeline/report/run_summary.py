"""What a run comes to, in a few lines; and where configs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.evaluation_groups import comparable, describe_kind
from pipeline.report.markup import Child, Html, breakable, table, tag
from pipeline.report.series import METRICS
from pipeline.runs.reader import Record, number
from pipeline.text import describe_bytes, shortened
from schemas.run import RunConfig

LOSSES = ("denoising", "feature", "attention")
MAX_STREAMS = 12


def run_card(record: Record, label: str, swatch: Html) -> Html:
    """A run at a glance."""
    lines: list[tuple[str, Child]] = [("Steps", _progress(record)), ("Phase", _phase(record))]
    lines += [("Steps per second", _rates(record)), ("Last losses", _last_losses(record))]
    lines += [("Last evaluation", _last_evaluation(record))]
    entries = [tag("div", tag("dt", name), tag("dd", said)) for name, said in lines if said]
    heading = tag("h3", swatch, breakable(label))
    where = tag("p", breakable(shortened(record.url, 120)), class_="where")
    return tag("article", heading, where, tag("dl", entries), _bytes_table(record))


def config_differences(
    records: Sequence[Record], labels: Sequence[Html]
) -> tuple[str, Html | None, int]:
    """A heading, the table and its rows: options that differ between the runs or, of one run, from
    the defaults. Names are dotted, as on the command line."""
    configs = [_flat(record.config) for record in records]
    if len(records) == 1:
        configs.insert(0, _flat(RunConfig().model_dump(mode="json")))
        labels = [tag("span", "default"), *labels]
        title = "What differs from the defaults"
    else:
        title = "What differs between the runs"
    known = [config for config in configs if config]
    names = dict.fromkeys(name for config in known for name in config)
    tables = {name.rpartition(".")[0] for name in names}
    rows: list[list[Child]] = []
    for name in names:
        if name == "name" or name in tables:
            continue
        values = [_value_of(config, name) if config else "unknown" for config in configs]
        if len({value for value, config in zip(values, configs, strict=True) if config}) > 1:
            rows.append([breakable(name), *values])
    return title, table(["option", *labels], rows) if rows else None, len(rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _value_of(config: Mapping[str, Any], name: str) -> str:
    """As text; "none" where a table above is switched off, a dash where there is no such option."""
    while name not in config and "." in name:
        name = name.rpartition(".")[0]
    return _shown(config[name]) if name in config else "\N{EN DASH}"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _progress(record: Record) -> str:
    of = f" of {record.steps:,}" if record.steps is not None else ""
    return f"{record.step:,}{of}"


def _phase(record: Record) -> str:
    if record.termination is not None:
        return f"2: alignment ended at step {record.termination:,}"
    if record.valid is not None and not record.valid.alignment.active:
        return "never aligned"
    return "1: aligned" if record.phase == 1 else "unknown" if record.phase is None else "2"


def _rates(record: Record) -> str:
    """Of each phase: as the run says at its end, else of its rows."""
    told = record.summary.get("steps_per_second")
    parts = []
    for phase, words in ((1, "aligned"), (2, "alone")):
        rate = number(told.get(f"phase{phase}")) if isinstance(told, Mapping) else None
        if rate is None:
            rows = [row for row in record.rows if row.get("phase") == phase]
            rates = sorted(filter(None, (number(row.get("steps_per_second")) for row in rows)))
            rate = rates[len(rates) // 2] if rates else None
        if rate is not None:
            parts.append(f"{rate:.3g} {words}")
    return ", ".join(parts)


def _last_losses(record: Record) -> Child:
    """The last number of each loss, and its step where that is not the run's last."""
    parts: list[Child] = []
    for name in LOSSES:
        for row in reversed(record.rows):
            value = number(row.get(name))
            if value is not None:
                at = "" if row is record.rows[-1] else f" at step {row['step']:,}"
                parts.append(tag("span", f"{name} {value:.4g}{at}".replace("-", "\N{MINUS SIGN}")))
                break
    return tag("span", parts, class_="list") if parts else None


def _last_evaluation(record: Record) -> Child:
    if not record.evaluations:
        return None
    row = record.evaluations[-1]
    values = ((name, number(row.get(metric))) for metric, name in METRICS.items())
    parts = [tag("span", f"{name} {value:.4g}") for name, value in values if value is not None]
    kind = ", ".join(describe_kind(comparable(row)))
    return tag(
        "span", tag("span", parts, class_="list"), tag("small", f"step {row['step']:,}; {kind}")
    )


def _bytes_table(record: Record) -> Child:
    counts, step = record.bytes_read, record.bytes_step
    if not counts:
        return None
    ended = record.termination is not None
    parts = ("before", "after") if ended else ("before",)
    rows: list[list[Child]] = [
        [stream, *(describe_bytes(count[part]) for part in parts)]
        for stream, count in list(counts.items())[:MAX_STREAMS]
    ]
    total = {part: sum(count[part] for count in counts.values()) for part in parts}
    rows.append(["all", *(describe_bytes(count) for count in total.values())])
    until = f"up to step {step:,}" if step is not None else "bytes read"
    head = [until, *(("while aligned", "after it") if ended else ("so far",))]
    return tag("div", table(head, rows), class_="bytes")
