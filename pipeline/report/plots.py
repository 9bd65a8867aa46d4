"""Panels drawn by matplotlib: as SVG files for the page, as one PNG file for a folder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.report.palette import GRID, INK, LIGHT, SVG_STYLE, run_colour, with_variables
from pipeline.report.rendering import data_uri
from pipeline.report.series import Panel, Unit, loss_panels, speed_panels
from pipeline.runs.reader import Record
from pipeline.text import describe_bytes, short_number, shortened
from schemas.errors import plain_text

SIZE = (5.0, 2.9)
"""Inches of 72 units, which are CSS pixels on a phone."""
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 2, 3, 2)))
MAX_ROWS, MAX_LINES = 10, 8
"""Steps and lines in the table of a plot's values."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text remains text: small, and in the reader's font
    "svg.hashsalt": "haste",  # equal runs give equal bytes
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "text.parse_math": False,  # a name with "$" is not a formula
    "axes.formatter.use_mathtext": False,
    "path.simplify_threshold": 0.3,
}
FORMATS: dict[Unit, Any] = {
    "plain": short_number,
    "bytes": describe_bytes,
    "share": lambda value: f"{100 * value:.3g}%",
}


class Plot(NamedTuple):
    """A panel for the page."""

    title: str
    notes: list[str]
    last_values: list[str]
    """The last number of each line, for readers who cannot see the picture."""
    image: Markup
    """A ``data:`` URI."""
    head: list[str]
    """Head of a table of some of the values: step, then the lines."""
    rows: list[list[str]]


def make_plot(panel: Panel, labels: Sequence[str], last: int, title: str | None = None) -> Plot:
    """A plot over steps up to ``last``; ``labels`` are those of all runs."""
    notes = []
    if panel.ends:
        notes.append("\N{BLACK DOWN-POINTING TRIANGLE} alignment ends")
    if panel.level is not None:
        notes.append(f"dashed: threshold {panel.level:g}")
    if panel.rows_per_point > 1:
        notes.append(f"means of {panel.rows_per_point} rows")
    if _cut_off(panel) is not None:
        notes.append("the first values are above the plot")
    values = [
        f"{labels[line.run]}{f' ({line.name})' if line.name else ''} "
        f"{line.values[-1]:.4g} at step {line.steps[-1]:.0f}"
        for line in panel.lines
    ]
    image = data_uri(panel_svg(panel, last), "image/svg+xml")
    return Plot(title or panel.title, notes, values, image, *_some_values(panel, labels))


def _some_values(panel: Panel, labels: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of about ``MAX_ROWS`` steps, the first and the last among them."""
    lines = panel.lines[:MAX_LINES]
    steps: set[float] = set()
    for line in lines:
        last = len(line.steps) - 1
        places = {round(n * last / (MAX_ROWS - 1)) for n in range(MAX_ROWS)}
        steps |= {line.steps[place] for place in places}
    describe = FORMATS[panel.unit]
    known = [dict(zip(line.steps, line.values, strict=True)) for line in lines]
    names = [f"{labels[line.run]}{f' ({line.name})' if line.name else ''}" for line in lines]
    rows = [
        [f"{step:,.0f}", *(describe(values[step]) if step in values else "" for values in known)]
        for step in sorted(steps)
    ]
    return ["step", *names], rows


def panel_svg(panel: Panel, last: int) -> bytes:
    """An SVG file that follows the reader's light or dark scheme; the steps end at ``last``."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        draw_panel(figure.add_subplot(), panel, last)
        file = io.BytesIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = with_variables(file.getvalue().decode())
    svg = svg[svg.index("<svg ") :]  # without the XML declaration
    return svg.replace(">", f"><style>{SVG_STYLE}</style>", 1).encode()


def draw_curves(record: Record, path: Path) -> None:
    """Losses and speed of one run as a PNG file."""
    panels = [*loss_panels([record]), *speed_panels([record])[:1]]
    with mpl.rc_context({**SETTINGS, "font.size": 9}):
        figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            draw_panel(axis, panel, record.step)
            axis.set_title(panel.title, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def draw_panel(axis: Axes, panel: Panel, last: int) -> None:
    """Lines, ends of the alignment, threshold and axes with short numbers."""
    for line in panel.lines:
        axis.plot(
            line.steps,
            line.values,
            color=run_colour(line.run),
            linestyle=DASHES[(line.style + line.run // len(LIGHT)) % len(DASHES)],
            linewidth=1.7,
            marker="o" if panel.dots or len(line.steps) == 1 else None,
            markersize=4.5,
            label=None if line.name is None else shortened(plain_text(line.name), 40),
        )
    for run, step in panel.ends.items():
        colour, top = run_colour(run), axis.get_xaxis_transform()
        axis.axvline(step, color=colour, linestyle=(0, (2, 2)), linewidth=1.1)
        axis.plot(step, 1, color=colour, marker="v", markersize=7, transform=top, clip_on=False)
    if panel.level is not None:
        axis.axhline(panel.level, color=INK, linestyle=(0, (4, 3)), linewidth=1)
    axis.set_xlabel("step", color=INK)
    axis.set_xlim(0, max(last, 1) * 1.02)
    axis.set_ylim(*_limits(panel))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    describe = FORMATS[panel.unit]
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: describe(value)))
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(color=GRID, labelcolor=INK, length=3)
    for spine in axis.spines.values():
        spine.set_color(GRID)
    if any(line.name is not None for line in panel.lines):
        _add_legend(axis)


def _add_legend(axis: Axes) -> None:
    """One entry for each name, which lines of several runs may have."""
    handles, labels = axis.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    style: dict[str, Any] = {"fontsize": 9, "frameon": False, "handlelength": 3, "loc": "best"}
    legend = axis.legend(list(entries.values()), list(entries), labelcolor=INK, **style)
    legend.set_zorder(1)


def _limits(panel: Panel) -> tuple[float, float]:
    """Lower and upper end of the vertical axis."""
    values = panel.values if panel.level is None else [*panel.values, panel.level]
    low, high = min(values), max(values)
    if panel.from_zero and low >= 0:
        return 0, 1.12 * high if high else 1.0
    cut = _cut_off(panel)
    top = high if cut is None else cut
    margin = (top - low) * 0.07 or abs(low) * 0.05 or 1.0
    return low - margin, top + margin if cut is None else top


def _cut_off(panel: Panel) -> float | None:
    """The value above which a panel is cut off because its first numbers would flatten all others;
    None if it is shown completely."""
    later = [value for line in panel.lines for value in line.values[len(line.values) // 20 + 1 :]]
    if not panel.settles or len(later) < 20:
        return None
    low, high = min(panel.values), max(later)
    top = high + 0.6 * (high - low)
    return top if max(panel.values) > top else None
