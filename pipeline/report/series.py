"""What the page's plots show: lines of numbers over steps, made of the records of runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.report.evaluation_groups import Kind, comparable, describe_kind
from pipeline.runs.reader import Record, Row, number

MAX_POINTS = 400
"""Of one line: more than a phone has pixels for."""
MAX_PANELS = 48
"""Of evaluations, which name networks and references as they like."""

Unit = Literal["plain", "bytes", "share"]

LOSSES = {
    "denoising": "Denoising loss",
    "feature": "Feature loss (\N{MINUS SIGN}cosine)",
    "attention": "Attention cross-entropy (nats)",
    "grad_norm": "Gradient norm, before clipping",
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
}
BYTES = "bytes_per_second_"


@dataclass(frozen=True)
class Line:
    """Numbers of one run over steps."""

    run: int
    """Which decides its colour."""
    steps: Sequence[float]
    values: Sequence[float]
    name: str | None = None
    """Of a line that is not its run's only one in the panel."""
    style: int = 0
    """Its dashes: 0 is solid."""


@dataclass(frozen=True)
class Panel:
    """One plot."""

    title: str
    lines: tuple[Line, ...]
    ends: Mapping[int, int]
    """Run to the step at which its alignment ended, of runs that have a line here."""
    unit: Unit = "plain"
    from_zero: bool = False
    dots: bool = False
    """Whether each number stands for itself, as an evaluation's does."""
    settles: bool = False
    """Whether the first few numbers may be far above all others, which they must not flatten."""
    level: float | None = None
    """A horizontal line: what the numbers are compared with."""
    rows_per_point: int = 1
    """Rows of the metrics whose mean is one point, at most."""


def loss_panels(records: Sequence[Record]) -> list[Panel]:
    """Denoising, feature and attention loss, and the gradient's norm."""
    return _panels(records, ((key, title, "plain") for key, title in LOSSES.items()), settles=True)


def speed_panels(records: Sequence[Record]) -> list[Panel]:
    """Images/s, waits for data and what the devices do."""
    kinds = ((key, title, unit) for key, (title, unit) in SPEEDS.items())
    return _panels(records, kinds, from_zero=True)


def byte_panels(records: Sequence[Record]) -> list[Panel]:
    """Bytes per second of every stream that a run read. A run that was resumed without its
    teacher no longer opens that stream: nothing was read of it then."""
    streams: dict[str, None] = {}
    for record in records:
        for row in record.rows:
            streams.update(dict.fromkeys(key for key in row if key.startswith(BYTES)))
    panels: list[Panel] = []
    for key in list(streams)[:MAX_PANELS]:
        lines: list[Line] = []
        sizes = [1]
        for run, record in enumerate(records):
            if any(key in row for row in record.rows):
                rows = [row if key in row else {**row, key: 0} for row in record.rows]
                _add_line(lines, sizes, run, rows, key)
        title = f"Read of stream {key.removeprefix(BYTES)}, per second"
        _add_panel(panels, records, title, lines, sizes, unit="bytes", from_zero=True)
    return panels


def evaluation_panels(records: Sequence[Record]) -> list[Panel]:
    """A panel for each metric and what makes its numbers comparable: network, number of samples,
    reference, how they were drawn; a line for each run and kind of weights."""
    panels: list[Panel] = []
    kinds: dict[Kind, list[list[Row]]] = {}
    for run, record in enumerate(records):
        for row in record.evaluations:
            kinds.setdefault(comparable(row), [[] for _ in records])[run].append(row)
    for metric, name in METRICS.items():
        for kind, of_runs in kinds.items():
            lines = [
                line
                for run, rows in enumerate(of_runs)
                for line in _evaluation_lines(run, rows, metric)
            ]
            title = ", ".join([name, *describe_kind(kind)])
            if len(panels) < MAX_PANELS:
                _add_panel(panels, records, title, lines, [1], dots=True)
    return panels


def trigger_panel(records: Sequence[Record], run: int) -> Panel | None:
    """What one run's trigger saw, where it looked more than once."""
    record = records[run]
    keys: dict[str, None] = {}
    for row in record.events:
        keys.update(dict.fromkeys(observed(row)))
    lines: list[Line] = []
    sizes = [1]
    for style, key in enumerate(list(keys)[:6]):
        _add_line(lines, sizes, run, record.events, key, name=key, style=style)
    if not any(len(line.steps) > 1 for line in lines):
        return None
    panels: list[Panel] = []
    level = None
    trigger = record.valid.alignment.termination if record.valid else None
    if trigger is not None and trigger.kind == "gradient_cosine":
        level = trigger.threshold
    _add_panel(panels, records, record.name, lines, sizes, dots=True, level=level)
    return panels[0]


def observed(row: Row) -> dict[str, float]:
    """The numbers of a trigger's observation by name."""
    values = {key: number(value) for key, value in row.items() if key not in {"step", "event"}}
    return {key: value for key, value in values.items() if value is not None}


def _panels(
    records: Sequence[Record],
    kinds: Iterable[tuple[str, str, Unit]],
    *,
    from_zero: bool = False,
    settles: bool = False,
) -> list[Panel]:
    panels: list[Panel] = []
    for key, title, unit in kinds:
        lines: list[Line] = []
        sizes = [1]
        for run, record in enumerate(records):
            _add_line(lines, sizes, run, record.rows, key)
        _add_panel(
            panels, records, title, lines, sizes, unit=unit, from_zero=from_zero, settles=settles
        )
    return panels


def _add_panel(
    panels: list[Panel],
    records: Sequence[Record],
    title: str,
    lines: Sequence[Line],
    sizes: Sequence[int],
    **options: Any,
) -> None:
    """A panel where there is anything to show."""
    if not lines:
        return
    ends = {line.run: records[line.run].termination for line in lines}
    marked = {run: step for run, step in ends.items() if step is not None}
    panels.append(Panel(title, tuple(lines), marked, rows_per_point=max(sizes), **options))


def _add_line(
    lines: list[Line],
    sizes: list[int],
    run: int,
    rows: Sequence[Row],
    key: str,
    *,
    name: str | None = None,
    style: int = 0,
) -> None:
    points = [(row, number(row.get(key))) for row in rows]
    found = [(row["step"], value, row.get("phase")) for row, value in points if value is not None]
    if found:
        steps, values, size = thinned(found)
        lines.append(Line(run, steps, values, name, style))
        sizes.append(size)


def thinned(
    points: Sequence[tuple[int, float, Any]], most: int = MAX_POINTS
) -> tuple[list[float], list[float], int]:
    """Means of as many neighbours as leave about ``most`` points; steps, values and how many.
    Points (step, value, phase) of different phases are never one: the drop at the termination
    stays as steep as it was."""
    size = -(-len(points) // most)
    steps, values = [], []
    begin = 0
    while begin < len(points):
        end = begin + 1
        while end < min(begin + size, len(points)) and points[end][2] == points[begin][2]:
            end += 1
        some = points[begin:end]
        steps.append(sum(step for step, _, _ in some) / len(some))
        values.append(sum(value / len(some) for _, value, _ in some))
        begin = end
    return steps, values, size


def _evaluation_lines(run: int, rows: Sequence[Row], metric: str) -> list[Line]:
    """One for each kind of weights, averaged ones solid."""
    lines: list[Line] = []
    for style, weights in enumerate(("ema", "model")):
        name = None if weights == "ema" else "weights as trained"
        of_these = [row for row in rows if row.get("weights", "ema") == weights]
        _add_line(lines, [], run, of_these, metric, name=name, style=style)
    return lines
