"""Reader of a run's folder, whose files are not trusted: sizes are bounded, damage is reported."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import yaml

from pipeline.checkpoints.integrity import STATE, parse_state_json
from pipeline.checkpoints.selection import checkpoint_name, steps_of
from pipeline.cli.yaml12 import load_yaml
from pipeline.runs.directory import CONFIG, METRICS, SAMPLES, SUMMARY
from pipeline.runs.evaluations import EVALUATIONS
from pipeline.runs.metrics import (
    BROKEN_SAMPLES,
    EVALUATION,
    NO_DISTANCE,
    NOT_FINITE,
    VALIDATION_LOSS,
)
from pipeline.storage.files import (
    absolute_url,
    is_local,
    list_folder,
    open_url,
    read_at_most,
    redact,
)
from pipeline.storage.redaction import redacted_config
from schemas.errors import UserError, plain_text
from schemas.run import RunConfig
from schemas.validation import validate

ATTENTION = "attention"

MAX_BYTES = {METRICS: 256 << 20, EVALUATIONS: 16 << 20, CONFIG: 1 << 20, SUMMARY: 1 << 20}
MAX_STATE_BYTES = 16 << 20
MAX_COUNT = 1 << 53
MAX_NUMBER = 1e30
"""Arithmetic with larger numbers overflows in a plot."""
MAX_PICTURES = 100_000
MAX_OPTIONS, MAX_OPTION_DEPTH, MAX_LIST = 500, 6, 50
LOSSES = ("denoising", "feature", "attention", "grad_norm")

Row = dict[str, Any]


@dataclass
class Record:
    """Contents of one run's folder."""

    url: str
    """As the user gave it, without credentials."""
    name: str
    filesystem: fsspec.AbstractFileSystem
    root: str
    warnings: list[str] = field(default_factory=list)
    """Sentences about files that cannot be read."""
    config: dict[str, Any] = field(default_factory=dict)
    """Plain values with all defaults; empty where it cannot be read."""
    valid: RunConfig | None = None
    """The same as a model, where this version can validate it."""
    rows: list[Row] = field(default_factory=list)
    """Measurements, by step."""
    events: list[Row] = field(default_factory=list)
    """Observations and decisions of the termination's trigger, by step."""
    evaluations: list[Row] = field(default_factory=list)
    validations: list[Row] = field(default_factory=list)
    """Validation losses, by step."""
    summary: dict[str, Any] = field(default_factory=dict)
    samples: dict[int, str] = field(default_factory=dict)
    """Paths of sample grids by step."""
    attention: dict[int, str] = field(default_factory=dict)
    """Paths of attention pictures by step."""
    checkpoints: list[int] = field(default_factory=list)
    """Steps of the checkpoints in the folder, ascending."""
    bytes_read: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes "before" and "after" the termination by stream."""
    bytes_step: int | None = None
    """Step up to which ``bytes_read`` counts; None for the whole run."""

    @property
    def folder(self) -> Path | None:
        """The run's folder where it is a local one."""
        return Path(self.root) if is_local(self.filesystem) else None

    @property
    def step(self) -> int:
        """Last step in the metrics."""
        return max((row["step"] for row in [*self.rows, *self.events]), default=0)

    @property
    def steps(self) -> int | None:
        """Number of steps in the config."""
        return as_count(self.config.get("steps"))

    @property
    def termination(self) -> int | None:
        """The first step without alignment; None before it, or if the run was never aligned."""
        for row in self.events:
            if row["event"] == "alignment terminated":
                return int(row["step"])
        return as_count(self.summary.get("termination_step"))

    @property
    def phase(self) -> int | None:
        """1 aligned, 2 not, None if unknown."""
        return as_count(self.rows[-1].get("phase")) if self.rows else None


def read_run(url: str) -> Record:
    """The record of a run. Raises ``UserError`` where the folder is not a run's."""
    filesystem, root = open_url(absolute_url(url), what="RUN")
    shown = redact(url.rstrip("/")) or "/"
    record = Record(shown, root.rsplit("/", 1)[-1], filesystem, root)
    names = {path.rsplit("/", 1)[-1] for path in list_folder(filesystem, root)}
    if not names:
        raise UserError(f"RUN '{shown}': there is no such folder, or it is empty")
    if METRICS not in names:
        raise UserError(
            f"RUN '{shown}' holds no {METRICS}: name the folder of a run, such as runs/demo"
        )
    _read_metrics(record)
    _read_config(record, names)
    if EVALUATIONS in names:
        record.evaluations = _by_step(_read_rows(record, EVALUATIONS))
    if SUMMARY in names:
        record.summary = _read_summary(record)
    record.checkpoints = steps_of(names)
    _read_bytes_read(record)
    for folder, pictures in ((SAMPLES, record.samples), (ATTENTION, record.attention)):
        if folder in names:
            pictures.update(_list_pictures(record, folder))
    return record


def number(value: Any) -> float | None:
    """``value`` as a float if it is a finite number of at most ``MAX_NUMBER``, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        as_float = float(value)
    except OverflowError:
        return None
    return as_float if abs(as_float) <= MAX_NUMBER else None  # also None for NaN


def as_count(value: Any) -> int | None:
    """``value`` if it is an integer from 0 to ``MAX_COUNT``, else None."""
    valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT
    return value if valid else None


def _read_metrics(record: Record) -> None:
    rows = _read_rows(record, METRICS)
    record.rows = _by_step({r["step"]: r for r in rows if "event" not in r}.values())  # last wins
    events = _by_step(row for row in rows if isinstance(row.get("event"), str))
    # evaluations have a file of their own
    others = {EVALUATION, NO_DISTANCE, BROKEN_SAMPLES, NOT_FINITE, VALIDATION_LOSS}
    measured = {row["step"]: row for row in events if row["event"] == VALIDATION_LOSS}
    record.validations = _by_step(measured.values())
    record.events = [row for row in events if row["event"] not in others]
    for kind in (NO_DISTANCE, BROKEN_SAMPLES, NOT_FINITE):
        found = [row for row in events if row["event"] == kind]
        if found:
            reason = plain_text(str(found[0].get("reason", "")))[:200]
            times = f", {len(found)} times in all" if len(found) > 1 else ""
            record.warnings.append(f"{kind} at step {found[0]['step']:,}: {reason}{times}")
    for name in LOSSES:
        steps = [r["step"] for r in record.rows if name in r and number(r[name]) is None]
        if steps:
            record.warnings.append(
                f"'{name}' is not a finite number in {len(steps)} rows, first at step {steps[0]:,}"
            )


def _read_bytes_read(record: Record) -> None:
    """From the summary of a finished run, else from the newest checkpoint."""
    streams = record.summary.get("bytes_read")
    if not isinstance(streams, Mapping) and record.checkpoints:
        record.bytes_step = record.checkpoints[-1]
        streams = _read_state(record, record.bytes_step).get("bytes_read")
    for stream, counts in streams.items() if isinstance(streams, Mapping) else ():
        if isinstance(counts, Mapping):
            record.bytes_read[str(stream)] = {
                period: as_count(counts.get(period)) or 0 for period in ("before", "after")
            }


def _by_step(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: int(row["step"]))


def _read_rows(record: Record, name: str) -> list[Row]:
    """The rows of a JSONL file that have a step. A last line without a newline is ignored, because
    a crash can cut it off; other damage becomes a warning."""
    lines = _read(record, name).split(b"\n")
    rows: list[Row] = []
    damaged = []
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and as_count(row.get("step")) is not None:
            rows.append(row)
        elif line_number < len(lines):
            damaged.append(line_number)
    if damaged:
        count = "1 damaged line" if len(damaged) == 1 else f"{len(damaged)} damaged lines"
        record.warnings.append(f"skipped {count} of {name}, first at line {damaged[0]}")
    return rows


def _read_config(record: Record, names: set[str]) -> None:
    if CONFIG not in names:
        record.warnings.append(f"there is no {CONFIG}: the run's options are unknown")
        return
    try:
        values = load_yaml(_read(record, CONFIG))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        record.warnings.append(f"{CONFIG} cannot be read: {plain_text(str(error))[:160]}")
        return
    if not isinstance(values, dict):
        record.warnings.append(f"{CONFIG} cannot be read: it is not a mapping of options")
        return
    try:
        record.valid = validate(RunConfig, values, where=CONFIG)
        record.config = redacted_config(record.valid.model_dump(mode="json"))
    except UserError as error:  # of another version, or edited: its values can still be shown
        record.warnings.append(f"{CONFIG} is not valid for this version: {str(error)[:200]}")
        record.config = _bounded_options(values)


def _bounded_options(values: Mapping[Any, Any]) -> dict[str, Any]:
    """A copy without credentials, of at most ``MAX_OPTIONS`` values and ``MAX_OPTION_DEPTH``
    levels: a few YAML anchors can make a tree of any size."""
    remaining = MAX_OPTIONS

    def copied(value: Any, depth: int) -> Any:
        nonlocal remaining
        remaining -= 1
        if remaining < 0 or (depth == 0 and isinstance(value, Mapping | list)):
            return "..."
        if isinstance(value, Mapping):
            items = itertools.islice(value.items(), MAX_OPTIONS)
            return {str(key): copied(inner, depth - 1) for key, inner in items}
        if isinstance(value, list):
            return [copied(inner, depth - 1) for inner in value[:MAX_LIST]]
        return value

    return dict(redacted_config(copied(values, MAX_OPTION_DEPTH)))


def _read_summary(record: Record) -> dict[str, Any]:
    try:
        summary = json.loads(_read(record, SUMMARY))
    except (ValueError, RecursionError):
        summary = None
    if isinstance(summary, dict):
        return summary
    record.warnings.append(f"{SUMMARY} cannot be read: it is not a JSON object")
    return {}


def _read_state(record: Record, step: int) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint, empty if it cannot be read."""
    path = f"{record.root}/{checkpoint_name(step)}"
    try:
        data = read_at_most(record.filesystem, f"{path}/{STATE}", MAX_STATE_BYTES)
        return parse_state_json(data, path)
    except FileNotFoundError:
        record.warnings.append(f"{checkpoint_name(step)} has no {STATE}")
    except (UserError, RecursionError) as error:
        record.warnings.append(redact(str(error)))
    return {}


def _list_pictures(record: Record, folder: str) -> dict[int, str]:
    found = {}
    for path in list_folder(record.filesystem, f"{record.root}/{folder}")[:MAX_PICTURES]:
        match = re.fullmatch(r"step-(\d{9})\.png", path.rsplit("/", 1)[-1], re.ASCII)
        if match is not None:
            found[int(match[1])] = path
    return found


def _read(record: Record, name: str) -> bytes:
    """The first ``MAX_BYTES`` of a file that was listed in the folder; empty if it cannot be
    read."""
    size = MAX_BYTES[name]
    try:
        data = read_at_most(record.filesystem, f"{record.root}/{name}", size + 1)
    except (UserError, FileNotFoundError) as error:
        record.warnings.append(f"{name} cannot be read: {redact(str(error))}")
        return b""
    if len(data) > size:
        record.warnings.append(f"only the first {size >> 20} MiB of {name} are read")
    return data[:size]
