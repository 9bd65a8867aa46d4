"""The page: one HTML file that needs nothing else and runs no script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from pipeline.assets import REPORT_STYLE
from pipeline.report.evaluation_groups import comparable, describe_kind
from pipeline.report.gallery import Source, gallery, load_file
from pipeline.report.markup import Child, Html, breakable, image, join, table, tag
from pipeline.report.palette import FONTS, LIGHT, SCHEMES
from pipeline.report.plots import highest_shown, panel_svg
from pipeline.report.run_summary import config_differences, run_card
from pipeline.report.series import METRICS as EVALUATED
from pipeline.report.series import (
    Panel,
    byte_panels,
    evaluation_panels,
    loss_panels,
    observed,
    speed_panels,
    trigger_panel,
)
from pipeline.runs.reader import Record, Row, number, read_run
from pipeline.storage.files import absolute_url, open_url, redact, write_atomic
from pipeline.text import describe_bytes, shortened
from schemas.errors import UserError
from schemas.report import Attention, ReportConfig

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'"
MAX_LABEL = 64
STUDENTS_STREAMS = frozenset({"latents", "text"})
"""What the student itself reads; all others are of teachers."""
FIRST_ROWS, LAST_ROWS = 10, 20
"""Of a long table: how it began and how it ended."""


class Report:
    """The page of several runs, and what went wrong as it was made."""

    def __init__(self, records: Sequence[Record], *, attention: Attention) -> None:
        """``attention``: whether it is drawn of checkpoints, where a run has drawn none itself."""
        self.records = records
        self.labels = labels_of(records)
        self.warnings: list[str] = []
        self._attention_of = attention
        self._last = max(record.step for record in records)

    def html(self) -> str:
        """The whole page."""
        sections = [
            self._section("Runs", self._cards()),
            self._differences(),
            self._section("Samples", self._samples()),
            self._section("Evaluation", self._evaluations()),
            self._section("Losses", self._plots(loss_panels(self.records))),
            self._section("When the alignment ends", self._triggers()),
            self._section("Attention", self._attention()),
            self._section("Speed", self._plots(speed_panels(self.records))),
            self._section("Data", self._data()),
        ]
        for label, record in zip(self.labels, self.records, strict=True):
            self.warnings += [f"{label}: {warning}" for warning in record.warnings]
        # written last: making the sections may have found damage
        title = f"Training report: {', '.join(self.labels)}"
        body = [self._header(), self._legend(), self._warned(), tag("main", sections)]
        head = [
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
            tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name_="color-scheme", content="light dark"),
            tag("meta", name_="referrer", content="no-referrer"),
            tag("title", shortened(title, 120)),
            tag("style", _style()),
        ]
        return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"

    def _header(self) -> Html:
        count = len(self.records)
        runs = "one run" if count == 1 else f"{count} runs"
        return tag(
            "header",
            tag("p", "HASTE", class_="above"),
            tag("h1", "Training report"),
            tag("p", f"{runs}, up to step {self._last:,}", class_="below"),
        )

    def _legend(self) -> Html:
        chips = [
            tag("li", self._swatch(run), tag("span", label), title=record.url)
            for run, (label, record) in enumerate(zip(self.labels, self.records, strict=True))
        ]
        return tag("nav", tag("ul", chips), class_="legend", aria_label="Colours of the runs")

    def _warned(self) -> Child:
        if not self.warnings:
            return None
        lines = [tag("li", warning) for warning in self.warnings[:50]]
        if len(self.warnings) > 50:
            lines.append(tag("li", f"and {len(self.warnings) - 50} more"))
        return tag("aside", tag("h2", "Not everything could be read"), tag("ul", lines))

    def _section(self, title: str, content: Child) -> Child:
        inside = join(content)
        return tag("section", tag("h2", title), inside) if inside else None

    def _cards(self) -> Html:
        cards = [
            run_card(record, label, self._swatch(run))
            for run, (label, record) in enumerate(zip(self.labels, self.records, strict=True))
        ]
        return tag("div", cards, class_="cards")

    def _differences(self) -> Child:
        title, found, rows = config_differences(self.records, self._heads())
        if found is None:
            found = tag("p", "Nothing but the name.", class_="note")
        if len(self.records) > 1:
            return self._section(title, found)
        summary = tag("summary", f"{title} ({rows} options)")
        return tag("section", tag("details", summary, found))

    def _samples(self) -> list[Html]:
        sources = [
            Source(label, self._swatch(run), sorted(record.samples), _loader(record, "samples"))
            for run, (label, record) in enumerate(zip(self.labels, self.records, strict=True))
        ]
        return gallery(sources, "Samples", self._warn, wide=False)

    def _attention(self) -> list[Html]:
        sources, notes = [], []
        for run, (label, record) in enumerate(zip(self.labels, self.records, strict=True)):
            steps, load = sorted(record.attention), _loader(record, "attention")
            if not steps and self._attention_of != "none":
                from pipeline.report.checkpoint_attention import attention_of_kept  # torch

                remote = self._attention_of == "remote"
                drawn, note = attention_of_kept(record, remote_stores=remote)
                steps, load = sorted(drawn), drawn.__getitem__
                if note is not None:
                    notes.append(tag("p", f"{label}: {note}.", class_="note"))
            sources.append(Source(label, self._swatch(run), steps, load))
        shown = gallery(sources, "Attention of teacher and student", self._warn, wide=True)
        return [*shown, *notes]

    def _evaluations(self) -> list[Html]:
        plots = self._plots(evaluation_panels(self.records))
        rows: list[list[Child]] = []
        for run, record in enumerate(self.records):
            for row in _ends(record.evaluations):
                values = [number(row.get(metric)) for metric in EVALUATED]
                rows.append(
                    [
                        [self._swatch(run), self.labels[run]],
                        f"{row['step']:,}",
                        *("\N{EN DASH}" if v is None else f"{v:.4g}" for v in values),
                        "; ".join([*describe_kind(comparable(row)), _weights(row)]),
                    ]
                )
        if not rows:
            return plots
        head = ["run", "step", *EVALUATED.values(), "how"]
        return [*plots, tag("details", tag("summary", "All numbers"), table(head, rows))]

    def _triggers(self) -> list[Html]:
        nodes = []
        for run, (label, record) in enumerate(zip(self.labels, self.records, strict=True)):
            if not record.events:
                continue
            panel = trigger_panel(self.records, run)
            plot = self._plot(panel, title="What the trigger saw") if panel else None
            names = list(dict.fromkeys(key for row in record.events for key in observed(row)))[:8]
            rows: list[list[Child]] = []
            for row in _ends(record.events):
                seen = observed(row)
                values = [f"{seen[name]:.4g}" if name in seen else "\N{EN DASH}" for name in names]
                rows.append([f"{row['step']:,}", row["event"], *values])
            left_out = len(record.events) - len(rows)
            note = f"{left_out:,} observations in between are left out." if left_out else None
            found = table(["step", "decision", *map(breakable, names)], rows)
            heading = tag("h3", self._swatch(run), breakable(label))
            kind = "trigger plotted" if plot else "trigger"
            beside = tag("div", found, tag("p", note, class_="note") if note else None)
            nodes.append(tag("div", heading, tag("div", plot, beside, class_=kind)))
        return nodes

    def _data(self) -> list[Html]:
        plots = self._plots(byte_panels(self.records))
        let_go = [record for record in self.records if record.termination is not None]
        if plots and any(record.bytes_read for record in let_go):
            read = sum(
                count["after"]
                for record in let_go
                for stream, count in record.bytes_read.items()
                if stream not in STUDENTS_STREAMS
            )
            said = f"Of the teachers' streams, {describe_bytes(read)} were read after the alignment"
            plots.insert(0, tag("p", f"{said} had ended.", class_="note"))
        return plots

    def _plots(self, panels: Sequence[Panel]) -> list[Html]:
        if not panels:
            return []
        return [tag("div", [self._plot(panel) for panel in panels], class_="plots")]

    def _plot(self, panel: Panel, title: str | None = None) -> Html:
        title = title or panel.title
        notes = []
        if panel.ends:
            notes.append("\N{BLACK DOWN-POINTING TRIANGLE} alignment ends")
        if panel.level is not None:
            notes.append(f"dashed: threshold {panel.level:g}")
        if panel.rows_per_point > 1:
            notes.append(f"means of {panel.rows_per_point} rows")
        if highest_shown(panel) is not None:
            notes.append("the first steps lie above")
        picture = image(
            panel_svg(panel, self._last), "image/svg+xml", self._described(panel, title)
        )
        caption = tag("figcaption", tag("strong", title), tag("small", "; ".join(notes)))
        return tag("figure", caption, picture)

    def _described(self, panel: Panel, title: str) -> str:
        """The plot in words, for those who cannot see it."""
        parts = []
        for line in panel.lines:
            who = self.labels[line.run] + (f" ({line.name})" if line.name else "")
            parts.append(f"{who} {line.values[-1]:.4g} at step {line.steps[-1]:.0f}")
        return f"{title} over steps. Last: {'; '.join(parts)}."

    def _heads(self) -> list[Html]:
        return [
            join([self._swatch(run), tag("span", breakable(label))])
            for run, label in enumerate(self.labels)
        ]

    def _swatch(self, run: int) -> Html:
        colour = f"background:var(--run{run % len(LIGHT)})"
        return tag("i", class_="swatch", style=colour, aria_hidden="true")

    def _warn(self, label: str, what: str) -> None:
        self.warnings.append(f"{label}: {what}")


def labels_of(records: Sequence[Record]) -> list[str]:
    """Names that tell the runs apart: the folder's, with as many folders above it as that takes,
    else with a number."""
    paths = [[part for part in record.url.split("/") if part] or ["run"] for record in records]
    labels = []
    for path in paths:
        depth = 1
        same = [other for other in paths if other[-1:] == path[-1:] and other is not path]
        while depth < len(path) and any(other[-depth:] == path[-depth:] for other in same):
            depth += 1
        labels.append(shortened("/".join(path[-depth:]), MAX_LABEL))
    counted: dict[str, int] = {}
    for index, label in enumerate(labels):
        counted[label] = counted.get(label, 0) + 1
        if labels.count(label) > 1 and counted[label] > 1:
            labels[index] = f"{label} ({counted[label]})"
    return labels


def _ends(rows: Sequence[Row]) -> list[Row]:
    """All of a few rows; of many, the first and the last."""
    if len(rows) <= FIRST_ROWS + LAST_ROWS:
        return list(rows)
    return [*rows[:FIRST_ROWS], *rows[-LAST_ROWS:]]


def _weights(row: Row) -> str:
    return "averaged weights" if row.get("weights", "ema") == "ema" else "weights as trained"


def _loader(record: Record, kind: str) -> Callable[[int], bytes]:
    pictures = record.samples if kind == "samples" else record.attention
    return lambda step: load_file(record.filesystem, pictures[step])


def _style() -> Html:
    return Html(f"{SCHEMES}:root{{--fonts:{FONTS}}}{REPORT_STYLE.read_text()}")


def write_report(config: ReportConfig) -> tuple[Report, int]:
    """Write the page; what it is made of, and its bytes. Raises ``UserError``."""
    if not config.runs:
        raise UserError("RUN is missing: the folder of a run, or of several")
    if config.html is None:
        raise UserError("--html is missing: the page to write")
    named = Counter(absolute_url(run).rstrip("/") for run in config.runs)
    for run, times in named.items():
        if times > 1:
            raise UserError(f"RUN '{redact(run)}' is named {times} times")
    filesystem, path = open_url(absolute_url(config.html), what="--html")
    records = [read_run(run) for run in config.runs]
    report = Report(records, attention=config.attention)
    data = report.html().encode()
    write_atomic(filesystem, path, data)
    return report, len(data)
