"""The page: one HTML file that needs no other file and runs no script."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from pipeline.assets import REPORT_STYLE
from pipeline.report.evaluation_groups import describe_group, group_of
from pipeline.report.gallery import Gallery, Source, load_file, make_gallery
from pipeline.report.palette import FONTS, SCHEMES
from pipeline.report.rendering import breakable, data_uri, render, run_name
from pipeline.report.run_summary import config_differences, run_card
from pipeline.report.series import (
    METRICS,
    Panel,
    byte_panels,
    evaluation_panels,
    loss_panels,
    observations,
    speed_panels,
    trigger_panel,
    validation_panels,
)
from pipeline.runs.reader import Record, Row, number, read_run
from pipeline.storage.files import absolute_url, open_url, redact, write_atomic
from pipeline.text import counted, describe_bytes, shortened
from schemas.errors import UserError
from schemas.fields import CLASS
from schemas.report import Attention, ReportConfig

if TYPE_CHECKING:
    from pipeline.report.plots import Plot

logger = logging.getLogger(__name__)

MAX_LABEL = 64
MAX_COLUMNS = 8
STUDENT_STREAMS = frozenset({"latents", "text"})
"""Streams that the student itself reads, as it may class tokens; all others are a teacher's."""
FIRST_ROWS, LAST_ROWS = 10, 20
"""Rows of a long table that are shown."""
DASH = "\N{EN DASH}"


Values = dict[str, Any]
"""Values of a part of the page, by their names in its template."""


class Introduction(NamedTuple):
    """A part before the runs: what a comparison of them found."""

    title: str
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]]
    """Head and rows of each."""
    notes: Sequence[str] = ()
    pictures: Sequence[Path] = ()
    """PNG files."""


class Report:
    """The page of several runs, and the problems found while it was made."""

    def __init__(
        self,
        records: Sequence[Record],
        *,
        attention: Attention,
        introduction: Introduction | None = None,
    ) -> None:
        """``attention``: draw that of checkpoints for runs without attention pictures."""
        self.records = records
        self._introduction = introduction
        self.labels = make_labels(records)
        self.warnings: list[str] = []
        self._names = [run_name(run, label) for run, label in enumerate(self.labels)]
        self._attention_mode = attention
        self._last_step = max(record.step for record in records)

    def html(self) -> str:
        """The page; fills ``warnings``."""
        samples = make_gallery(
            [self._source(run, r, "samples") for run, r in enumerate(self.records)], self.warnings
        )
        attention, notes = self._attention()
        for label, record in zip(self.labels, self.records, strict=True):
            self.warnings += [f"{label}: {warning}" for warning in record.warnings]
        runs = zip(self._names, self.records, strict=True)
        return render(
            "report.html.jinja",
            title=shortened(f"Training report: {', '.join(self.labels)}", 120),
            style=Markup(f"{SCHEMES}:root{{--fonts:{FONTS}}}{REPORT_STYLE.read_text()}"),
            last_step=self._last_step,
            warnings=self.warnings,
            introduction=self._introduction,
            pictures=[
                {"name": path.stem, "image": data_uri(path.read_bytes(), "image/png")}
                for path in (self._introduction.pictures if self._introduction else ())
            ],
            runs=[{"name": n, "url": r.url, "card": run_card(r)} for n, r in runs],
            different=config_differences(self.records),
            samples=samples,
            evaluations=self._evaluations(),
            losses=self._plots([*loss_panels(self.records), *validation_panels(self.records)]),
            triggers=[self._trigger(run) for run, r in enumerate(self.records) if r.events],
            attention=attention,
            attention_notes=notes,
            speed=self._plots(speed_panels(self.records)),
            data=self._plots(byte_panels(self.records)),
            teacher_bytes=self._teacher_bytes(),
        )

    def _source(self, run: int, record: Record, kind: str) -> Source:
        paths = record.samples if kind == "samples" else record.attention

        def load(step: int) -> bytes:
            return load_file(record.filesystem, paths[step])

        return Source(self.labels[run], self._names[run], sorted(paths), load)

    def _attention(self) -> tuple[Gallery | None, list[str]]:
        """Pictures that the runs drew, else those of their checkpoints; and a sentence for each run
        that has none."""
        sources, notes = [], []
        for run, record in enumerate(self.records):
            source = self._source(run, record, "attention")
            if not source.steps and self._attention_mode != "none":
                from pipeline.report.checkpoint_attention import draw_checkpoint_attention  # torch

                pictures, note = draw_checkpoint_attention(
                    record, remote_stores=self._attention_mode == "remote"
                )
                source = source._replace(steps=sorted(pictures), load=pictures.__getitem__)
                notes += [] if note is None else [f"{source.label}: {note}."]
            sources.append(source)
        return make_gallery(sources, self.warnings), notes

    def _evaluations(self) -> Values:
        rows = []
        found = {key for record in self.records for row in record.evaluations for key in row}
        metrics = {key: name for key, name in METRICS.items() if key in found}
        for name, record in zip(self._names, self.records, strict=True):
            for row in _first_and_last(record.evaluations):
                values = (number(row.get(metric)) for metric in metrics)
                weights = "averaged" if row.get("weights", "ema") == "ema" else "as trained"
                group = f"{describe_group(group_of(row))}; weights {weights}"
                cells = [DASH if value is None else f"{value:.4g}" for value in values]
                rows.append([name, f"{row['step']:,}", *cells, group])
        head = ["run", "step", *metrics.values(), "network, reference and sampling"]
        return {"head": head, "rows": rows, "plots": self._plots(evaluation_panels(self.records))}

    def _trigger(self, run: int) -> Values:
        events = self.records[run].events
        panel = trigger_panel(self.records, run)
        keys = list(dict.fromkeys(key for row in events for key in observations(row)))[:MAX_COLUMNS]
        rows = []
        for row in _first_and_last(events):
            values = observations(row)
            cells = [f"{values[key]:.4g}" if key in values else DASH for key in keys]
            rows.append([f"{row['step']:,}", row["event"], *cells])
        plot = None if panel is None else self._plots([panel])[0]
        return {
            "name": self._names[run],
            "plot": plot,
            "head": ["step", "decision", *map(breakable, keys)],
            "rows": rows,
            "left_out": len(events) - len(rows),
        }

    def _teacher_bytes(self) -> str | None:
        """Bytes of teachers' streams that were read after the termination; None if unknown."""
        ended = [record for record in self.records if record.termination is not None]
        if not any(record.bytes_read for record in ended):
            return None
        counts = [item for record in ended for item in record.bytes_read.items()]
        return describe_bytes(sum(c["after"] for name, c in counts if not _is_students(name)))

    def _plots(self, panels: Sequence[Panel]) -> list[Plot]:
        from pipeline.report.plots import make_plot  # matplotlib takes a second to import

        return [make_plot(panel, self.labels, self._last_step) for panel in panels]


def make_labels(records: Sequence[Record]) -> list[str]:
    """Names that differ between the runs: the folder's, preceded by parent folders where needed, or
    followed by a number."""
    paths = [[part for part in record.url.split("/") if part] or ["run"] for record in records]
    labels: list[str] = []
    for path in paths:
        depth = 1
        same = [other for other in paths if other[-1:] == path[-1:] and other is not path]
        while depth < len(path) and any(other[-depth:] == path[-depth:] for other in same):
            depth += 1
        labels.append(shortened("/".join(path[-depth:]), MAX_LABEL))
    counts: Counter[str] = Counter()
    for index, label in enumerate(labels):
        counts[label] += 1
        if counts[label] > 1:
            labels[index] = f"{label} ({counts[label]})"
    return labels


def write_report(
    config: ReportConfig, introduction: Introduction | None = None
) -> tuple[Report, int]:
    """Write the page; returns the report and the bytes written. Raises ``UserError``."""
    if not config.runs:
        raise UserError("RUN is missing: name the folders of one or more runs")
    if config.html is None:
        raise UserError("--html is missing: name the HTML file to write")
    for run, count in Counter(absolute_url(run).rstrip("/") for run in config.runs).items():
        if count > 1:
            raise UserError(f"RUN '{redact(run)}' is named {count} times")
    filesystem, path = open_url(absolute_url(config.html), what="--html")
    records = [read_run(run) for run in config.runs]
    logger.info("drawing the page of %s", counted(len(records), "run"))
    report = Report(records, attention=config.attention, introduction=introduction)
    data = report.html().encode()
    write_atomic(filesystem, path, data)
    return report, len(data)


def _first_and_last(rows: Sequence[Row]) -> list[Row]:
    """All of a few rows; the first and the last ones of many."""
    if len(rows) <= FIRST_ROWS + LAST_ROWS:
        return list(rows)
    return [*rows[:FIRST_ROWS], *rows[-LAST_ROWS:]]


def _is_students(stream: str) -> bool:
    return stream in STUDENT_STREAMS or stream == CLASS or stream.endswith(f"_{CLASS}")
