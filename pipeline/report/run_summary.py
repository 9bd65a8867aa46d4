"""Main facts of a run in a few lines, and differences between configs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.report.evaluation_groups import describe_group, group_of
from pipeline.report.rendering import breakable
from pipeline.report.series import METRICS
from pipeline.runs.directory import CONFIG
from pipeline.runs.reader import Record, number
from pipeline.text import describe_bytes
from schemas.run import RunConfig

LOSSES = ("denoising", "class_token", "feature", "attention")
MAX_STREAMS = 12


class Entry(NamedTuple):
    """A line of a run's card."""

    name: str
    values: list[str]
    note: str = ""


class RunCard(NamedTuple):
    """A run in a few lines, and a table of the bytes that it read."""

    entries: list[Entry]
    bytes_head: list[str]
    bytes_rows: list[list[str]]


def run_card(record: Record) -> RunCard:
    total = "" if record.steps is None else f" of {record.steps:,}"
    entries = [
        Entry("Steps", [f"{record.step:,}{total}"]),
        Entry("Phase", [_phase(record)]),
        Entry("Steps per second", _rates(record)),
        Entry("Last losses", _last_losses(record)),
    ]
    if record.validations:
        row = record.validations[-1]
        names = {"validation_ema": "averaged weights", "validation_model": "as trained"}
        losses = {name: number(row.get(key)) for key, name in names.items()}
        shown = [f"{loss:.4g} {name}" for name, loss in losses.items() if loss is not None]
        entries.append(Entry("Validation loss", shown, f"step {row['step']:,}"))
    if record.evaluations:
        row = record.evaluations[-1]
        values = {name: number(row.get(metric)) for metric, name in METRICS.items()}
        shown = [f"{name} {value:.4g}" for name, value in values.items() if value is not None]
        note = f"step {row['step']:,}; {describe_group(group_of(row))}"
        entries.append(Entry("Last evaluation", shown, note))
    if record.config:
        config = shlex.quote(f"{record.url.rstrip('/')}/{CONFIG}")
        command = f"python jobs/train_haste.py --config {config}"
        entries.append(Entry("Command", [command], "continues the run, or repeats it elsewhere"))
    return RunCard(entries, *_bytes_table(record))


def config_differences(records: Sequence[Record]) -> list[list[str | Markup]]:
    """Rows (option, value of each run) of the options that differ between the runs; for a single
    run (option, default, its value) of those that differ from the defaults. Names are dotted, as on
    the command line."""
    configs = [_flat(record.config) for record in records]
    if len(records) == 1:
        configs.insert(0, _flat(RunConfig().model_dump(mode="json")))
    names = dict.fromkeys(name for config in configs for name in config if name != "name")
    tables = {name.rpartition(".")[0] for name in names}
    rows: list[list[str | Markup]] = []
    for name in names:
        values = [_value_of(config, name) if config else None for config in configs]
        if name not in tables and len({*values} - {None}) > 1:
            rows.append([breakable(name), *(value or "unknown" for value in values)])
    return rows


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
    """An option as text: "none" where a table that holds it is switched off, a dash where the
    config has no such option."""
    while name not in config and "." in name:
        name = name.rpartition(".")[0]
    return _value_text(config[name]) if name in config else "\N{EN DASH}"


def _value_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(_value_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _phase(record: Record) -> str:
    if record.termination is not None:
        return f"2: alignment ended at step {record.termination:,}"
    if record.valid is not None and not record.valid.alignment.active:
        return "never aligned"
    return {1: "1: aligned", None: "unknown"}.get(record.phase, "2")


def _rates(record: Record) -> list[str]:
    """Steps per second of each phase: from the summary of a finished run, else the median of the
    rows."""
    summary = record.summary.get("steps_per_second")
    found = []
    for phase, description in ((1, "aligned"), (2, "without alignment")):
        rate = number(summary.get(f"phase{phase}")) if isinstance(summary, Mapping) else None
        if rate is None:
            rows = [row for row in record.rows if row.get("phase") == phase]
            rates = sorted(filter(None, (number(row.get("steps_per_second")) for row in rows)))
            rate = rates[len(rates) // 2] if rates else None
        if rate is not None:
            found.append(f"{rate:.3g} {description}")
    return found


def _last_losses(record: Record) -> list[str]:
    """The last number of each loss, with its step where that is not the last of the run."""
    found = []
    for name in LOSSES:
        for row in reversed(record.rows):
            value = number(row.get(name))
            if value is not None:
                at = "" if row is record.rows[-1] else f" at step {row['step']:,}"
                found.append(f"{name} {value:.4g}{at}".replace("-", "\N{MINUS SIGN}"))
                break
    return found


def _bytes_table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Head and rows: bytes read of each stream before and after the termination."""
    counts, ended = record.bytes_read, record.termination is not None
    if not counts:
        return [], []
    periods = {"before": "while aligned", "after": "after it"} if ended else {"before": "so far"}
    until = "bytes read" if record.bytes_step is None else f"up to step {record.bytes_step:,}"
    total = {period: sum(count[period] for count in counts.values()) for period in periods}
    shown = [*list(counts.items())[:MAX_STREAMS], ("all", total)]
    rows = [[name, *(describe_bytes(count[p]) for p in periods)] for name, count in shown]
    return [until, *periods.values()], rows
