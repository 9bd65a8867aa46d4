"""What lies in a run's folder, read with distrust: sizes are bounded, damage is named."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import yaml

from pipeline.checkpoints.integrity import STATE, parse_state_json
from pipeline.checkpoints.selection import checkpoint_name, steps_of
from pipeline.runs.directory import CONFIG, METRICS, SAMPLES, SUMMARY
from pipeline.runs.evaluations import EVALUATIONS
from pipeline.runs.metrics import BROKEN_SAMPLES, EVALUATION, NO_DISTANCE
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
MAX_STEP = 1 << 53
MAX_NUMBER = 1e30
"""Beyond, a plot's arithmetic overflows."""
MAX_PICTURES = 100_000
MAX_OPTIONS, DEEPEST_OPTION = 500, 6

Row = dict[str, Any]


@dataclass
class Record:
    """One run as its files tell it."""

    url: str
    """As a person would write it, without credentials."""
    name: str
    filesystem: fsspec.AbstractFileSystem
    root: str
    warnings: list[str] = field(default_factory=list)
    """What could not be read: sentences for the page."""
    config: dict[str, Any] = field(default_factory=dict)
    """Plain values with all defaults; empty where it cannot be read."""
    valid: RunConfig | None = None
    """The same as a model, where it is one that this software knows."""
    rows: list[Row] = field(default_factory=list)
    """Measurements, by step."""
    events: list[Row] = field(default_factory=list)
    """What the termination's trigger saw and did, by step."""
    evaluations: list[Row] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    samples: dict[int, str] = field(default_factory=dict)
    """Paths of sample grids by step."""
    attention: dict[int, str] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    """Steps of those that were kept."""
    bytes_read: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per stream, before and after the termination."""
    bytes_step: int | None = None
    """Up to which they are counted, where that is not all of the run."""

    @property
    def folder(self) -> Path | None:
        """The run's folder where it is one of this machine."""
        return Path(self.root) if is_local(self.filesystem) else None

    @property
    def step(self) -> int:
        """Steps done, as far as the metrics tell."""
        return max((row["step"] for row in [*self.rows, *self.events]), default=0)

    @property
    def steps(self) -> int | None:
        """Steps to do."""
        return whole(self.config.get("steps"))

    @property
    def termination(self) -> int | None:
        """The first step without alignment, or None as long as there is alignment or never was."""
        for row in self.events:
            if row["event"] == "alignment terminated":
                return int(row["step"])
        return whole(self.summary.get("termination_step"))

    @property
    def phase(self) -> int | None:
        """1 aligned, 2 not, None where no row tells."""
        return whole(self.rows[-1].get("phase")) if self.rows else None


def read_run(url: str) -> Record:
    """The record of a run. Raises ``UserError`` where the folder is none of a run."""
    filesystem, root = open_url(absolute_url(url), what="RUN")
    shown = redact(url.rstrip("/")) or "/"
    record = Record(shown, root.rsplit("/", 1)[-1], filesystem, root)
    names = {path.rsplit("/", 1)[-1] for path in list_folder(filesystem, root)}
    if not names:
        raise UserError(f"RUN '{shown}': there is no such folder, or nothing in it")
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
    """A finite number of sane size as a float; None for anything else that a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        as_float = float(value)
    except OverflowError:
        return None
    return as_float if abs(as_float) <= MAX_NUMBER else None  # which NaN is not, either


def whole(value: Any) -> int | None:
    """A count or a step; None for anything else."""
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_STEP
    return value if fits else None


def _read_metrics(record: Record) -> None:
    rows = _read_rows(record, METRICS)
    # evaluations have a file of their own
    events = _by_step(row for row in rows if isinstance(row.get("event"), str))
    elsewhere = {EVALUATION, NO_DISTANCE, BROKEN_SAMPLES}
    record.events = [row for row in events if row["event"] not in elsewhere]
    for kind in (NO_DISTANCE, BROKEN_SAMPLES):
        found = [row for row in events if row["event"] == kind]
        if found:
            reason = plain_text(str(found[0].get("reason", "")))[:200]
            times = f", {len(found)} times in all" if len(found) > 1 else ""
            record.warnings.append(f"{kind} at step {found[0]['step']:,}: {reason}{times}")
    measured = {row["step"]: row for row in rows if "event" not in row}  # the last of a step counts
    record.rows = _by_step(measured.values())
    for name in ("denoising", "feature", "attention", "grad_norm"):
        lost = [row["step"] for row in record.rows if name in row and number(row[name]) is None]
        if lost:
            record.warnings.append(
                f"'{name}' is no finite number in {len(lost)} rows, first at step {lost[0]:,}"
            )


def _read_bytes_read(record: Record) -> None:
    """Of the summary at the run's end; as long as there is none, of the newest checkpoint."""
    told = record.summary.get("bytes_read")
    if not isinstance(told, Mapping) and record.checkpoints:
        record.bytes_step = record.checkpoints[-1]
        told = _state(record, record.bytes_step).get("bytes_read")
    for stream, count in told.items() if isinstance(told, Mapping) else ():
        if isinstance(count, Mapping):
            parts = {part: whole(count.get(part)) for part in ("before", "after")}
            record.bytes_read[str(stream)] = {part: value or 0 for part, value in parts.items()}


def _by_step(rows: Any) -> list[Row]:
    return sorted(rows, key=lambda row: int(row["step"]))


def _read_rows(record: Record, name: str) -> list[Row]:
    """The rows of a JSONL file that have a step. A last line that a crash cut short is left out;
    other damage is named."""
    data = _read(record, name)
    rows: list[Row] = []
    damaged = []
    lines = data.split(b"\n")
    for count, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and whole(row.get("step")) is not None:
            rows.append(row)
        elif count < len(lines):  # a whole line ends with a newline
            damaged.append(count)
    if damaged:
        lines_of = "line" if len(damaged) == 1 else f"{len(damaged)} lines, the first being"
        record.warnings.append(f"{name} is damaged and read without {lines_of} {damaged[0]}")
    return rows


def _read_config(record: Record, names: set[str]) -> None:
    if CONFIG not in names:
        record.warnings.append(f"there is no {CONFIG}, so nothing is known of its options")
        return
    try:
        values = yaml.safe_load(_read(record, CONFIG))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160]
        record.warnings.append(f"{CONFIG} cannot be read: {reason}")
        return
    if not isinstance(values, dict):
        record.warnings.append(f"{CONFIG} cannot be read: it is no mapping of options")
        return
    try:
        record.valid = validate(RunConfig, values, where=CONFIG)
        record.config = redacted_config(record.valid.model_dump(mode="json"))
    except UserError as error:  # of another version, or edited: what it says can still be shown
        record.warnings.append(f"{CONFIG} is not what this software writes: {str(error)[:200]}")
        record.config = _plain(values)


def _plain(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Options of any file, no more and none deeper than a config could have: a few YAML anchors
    make a tree of any size."""
    left = MAX_OPTIONS

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or (depth == 0 and isinstance(value, Mapping | list)):
            return "..."
        if isinstance(value, Mapping):
            return {
                str(key): copied(inner, depth - 1)
                for key, inner in itertools.islice(value.items(), MAX_OPTIONS)
            }
        if isinstance(value, list):
            return [copied(inner, depth - 1) for inner in value[:50]]
        return value

    return dict(redacted_config(copied(values, DEEPEST_OPTION)))


def _read_summary(record: Record) -> dict[str, Any]:
    try:
        summary = json.loads(_read(record, SUMMARY))
    except (ValueError, RecursionError):
        summary = None
    if isinstance(summary, dict):
        return summary
    record.warnings.append(f"{SUMMARY} cannot be read: it is no JSON object")
    return {}


def _state(record: Record, step: int) -> dict[str, Any]:
    where = f"{record.root}/{checkpoint_name(step)}"
    try:
        data = read_at_most(record.filesystem, f"{where}/{STATE}", MAX_STATE_BYTES)
        return parse_state_json(data, where)
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
    """A file of the folder, in which it was seen. Nothing where it cannot be read."""
    most = MAX_BYTES[name]
    try:
        data = read_at_most(record.filesystem, f"{record.root}/{name}", most + 1)
    except (UserError, FileNotFoundError) as error:
        record.warnings.append(f"{name} cannot be read: {redact(str(error))}")
        return b""
    if len(data) > most:
        record.warnings.append(f"{name} is read up to its first {most >> 20} MiB only")
    return data[:most]
