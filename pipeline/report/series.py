"""Lines of numbers over steps, from the records of runs: the contents of the page's plots."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.report.evaluation_groups import EvaluationGroup, describe_group, group_of
from pipeline.runs.reader import Record, Row, number

MAX_POINTS = 400
"""Points of one line: more than a small plot has pixels."""
MAX_PANELS = 48
"""Panels of evaluations or of streams, because the files of a run may name any number."""
MAX_OBSERVATIONS = 6

Unit = Literal["plain", "bytes", "share"]

LOSSES = {
    "denoising": "Denoising loss",
    "class_token": "Denoising loss of the class token",
    "feature": "Feature loss (\N{MINUS SIGN}cosine)",
    "attention": "Attention cross-entropy (nats)",
    "grad_norm": "Gradient norm, before clipping",
}
VALIDATION_LOSSES = {
    "": "Validation loss: denoising, samples not trained on",
    "_class_token": "Validation loss of the class token",
}
SPEEDS: Mapping[str, tuple[str, Unit]] = {
    "images_per_second": ("Images per second", "plain"),
    "data_wait_share": ("Share of the time spent waiting for data", "share"),
    "tflops_per_worker": ("TFLOP/s of one worker, student alone", "plain"),
    "mfu": ("MFU: share of the device's peak", "share"),
}
METRICS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "precision": "Precision",
    "recall": "Recall",
    "fd_dinov2": "FD-DINOv2",
    "fid_pytorch": "FID, PyTorch's resizing",
    "clip_score": "CLIP score",
}
WEIGHTS = {"ema": None, "model": "weights as trained"}
"""Names of the lines by kind of weights; the averaged ones need no name."""
BYTES = "bytes_per_second_"


@dataclass(frozen=True)
class Line:
    """Numbers of one run over steps."""

    run: int
    """Index of the run, which decides the colour."""
    steps: Sequence[float]
    values: Sequence[float]
    name: str | None = None
    """Set where its run has several lines in the panel."""
    style: int = 0
    """Dash pattern: 0 is solid."""
    rows_per_point: int = 1
    """Rows of the metrics whose mean is one point, at most."""


@dataclass(frozen=True)
class Panel:
    """One plot."""

    title: str
    lines: Sequence[Line]
    ends: Mapping[int, int]
    """Step at which the alignment ended by run, of the runs that have a line here."""
    unit: Unit = "plain"
    from_zero: bool = False
    dots: bool = False
    """Mark each number, for measurements that are far apart, such as evaluations."""
    settles: bool = False
    """The first few numbers may be far above all others and are then cut off."""
    level: float | None = None
    """A horizontal line: the threshold of the numbers."""

    @property
    def rows_per_point(self) -> int:
        return max(line.rows_per_point for line in self.lines)

    @property
    def values(self) -> list[float]:
        return [value for line in self.lines for value in line.values]


def loss_panels(records: Sequence[Record]) -> list[Panel]:
    """Denoising losses, feature and attention loss, and the gradient's norm."""
    return [
        panel
        for key, title in LOSSES.items()
        for panel in _panel(records, title, _metric_lines(records, key), settles=True)
    ]


def validation_panels(records: Sequence[Record]) -> list[Panel]:
    """Validation losses of averaged weights (solid) and of weights as trained."""
    panels: list[Panel] = []
    for kind, title in VALIDATION_LOSSES.items():
        lines = [
            line
            for run, record in enumerate(records)
            for style, (weights, name) in enumerate(WEIGHTS.items())
            for line in _line(
                run, record.validations, f"validation_{weights}{kind}", name=name, style=style
            )
        ]
        panels += _panel(records, title, lines, dots=True, settles=True)
    return panels


def speed_panels(records: Sequence[Record]) -> list[Panel]:
    """Images per second, share of time spent waiting for data, and use of the devices."""
    return [
        panel
        for key, (title, unit) in SPEEDS.items()
        for panel in _panel(records, title, _metric_lines(records, key), unit=unit, from_zero=True)
    ]


def byte_panels(records: Sequence[Record]) -> list[Panel]:
    """Bytes per second of every stream that a run read. Rows without a stream count as 0 bytes,
    because a run that is resumed after the termination does not open its teacher's stream."""
    streams = {key: None for r in records for row in r.rows for key in row if key.startswith(BYTES)}
    panels: list[Panel] = []
    for key in list(streams)[:MAX_PANELS]:
        lines: list[Line] = []
        for run, record in enumerate(records):
            if any(key in row for row in record.rows):
                lines += _line(run, [{key: 0, **row} for row in record.rows], key)
        title = f"Read of stream {key.removeprefix(BYTES)}, per second"
        panels += _panel(records, title, lines, unit="bytes", from_zero=True)
    return panels


def evaluation_panels(records: Sequence[Record]) -> list[Panel]:
    """A panel for each metric and group of comparable evaluations, with a line for each run and
    kind of weights (averaged ones solid)."""
    groups: dict[EvaluationGroup, list[tuple[int, Row]]] = {}
    for run, record in enumerate(records):
        for row in record.evaluations:
            groups.setdefault(group_of(row), []).append((run, row))
    panels: list[Panel] = []
    for metric, metric_name in METRICS.items():
        for group, members in groups.items():
            lines: list[Line] = []
            for run in range(len(records)):
                for style, (weights, name) in enumerate(WEIGHTS.items()):
                    rows = [
                        r for n, r in members if n == run and r.get("weights", "ema") == weights
                    ]
                    lines += _line(run, rows, metric, name=name, style=style)
            if len(panels) < MAX_PANELS:
                title = f"{metric_name}, {describe_group(group)}"
                panels += _panel(records, title, lines, dots=True)
    return panels


def trigger_panel(records: Sequence[Record], run: int) -> Panel | None:
    """Observations of one run's trigger, None if there are fewer than two."""
    record = records[run]
    keys = list(dict.fromkeys(key for row in record.events for key in observations(row)))
    lines: list[Line] = []
    for style, key in enumerate(keys[:MAX_OBSERVATIONS]):
        lines += _line(run, record.events, key, name=key, style=style)
    if not any(len(line.steps) > 1 for line in lines):
        return None
    trigger = record.valid.alignment.termination if record.valid else None
    level = trigger.threshold if trigger is not None and trigger.kind == "gradient_cosine" else None
    return _panel(records, "Observations of the trigger", lines, dots=True, level=level)[0]


def observations(row: Row) -> dict[str, float]:
    """The numbers of a trigger's observation by name."""
    values = {key: number(value) for key, value in row.items() if key not in {"step", "event"}}
    return {key: value for key, value in values.items() if value is not None}


def _panel(
    records: Sequence[Record], title: str, lines: Sequence[Line], **options: Any
) -> list[Panel]:
    """One panel, none if there are no lines."""
    ends = {line.run: records[line.run].termination for line in lines}
    marked = {run: step for run, step in ends.items() if step is not None}
    return [Panel(title, lines, marked, **options)] if lines else []


def _metric_lines(records: Sequence[Record], key: str) -> list[Line]:
    return [line for run, record in enumerate(records) for line in _line(run, record.rows, key)]


def _line(
    run: int, rows: Sequence[Row], key: str, *, name: str | None = None, style: int = 0
) -> list[Line]:
    """The numbers under ``key``, no line if there are none."""
    points = [
        (row["step"], value, row.get("phase"))
        for row in rows
        if (value := number(row.get(key))) is not None
    ]
    if not points:
        return []
    steps, values, size = thinned(points)
    return [Line(run, steps, values, name, style, size)]


def thinned(
    points: Sequence[tuple[int, float, Any]], count: int = MAX_POINTS
) -> tuple[list[float], list[float], int]:
    """Means of neighbouring (step, value, phase) points, about ``count`` of them: steps, values and
    the largest number of points in a mean. Points of different phases are never averaged, so the
    drop at the termination remains visible."""
    size = -(-len(points) // count)
    steps, values = [], []
    for _, phase in itertools.groupby(points, key=lambda point: point[2]):
        same = list(phase)
        for begin in range(0, len(same), size):
            some = same[begin : begin + size]
            steps.append(sum(step for step, _, _ in some) / len(some))
            values.append(sum(value / len(some) for _, value, _ in some))
    return steps, values, size
