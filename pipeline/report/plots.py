"""Panels drawn by matplotlib: as SVG for the page, as one PNG for a folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.report.palette import COLOURS, SVG_STYLE, Colours, variables
from pipeline.report.series import Panel, loss_panels, speed_panels
from pipeline.runs.reader import Record
from pipeline.text import describe_bytes, short_number, shortened
from schemas.errors import plain_text

SIZE = (5.0, 2.9)
"""Inches of 72 units, which are CSS pixels where the page is as wide as a phone."""
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 2, 3, 2)))
RULES: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and in the reader's own font
    "svg.hashsalt": "haste",  # so that the same runs give the same bytes
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "text.parse_math": False,  # names are no formulas, whatever signs are in them
    "axes.formatter.use_mathtext": False,
    "path.simplify_threshold": 0.3,
}


def panel_svg(panel: Panel, last: int) -> bytes:
    """A picture that follows the reader's light or dark scheme; steps go to ``last``."""
    with mpl.rc_context(RULES):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        draw_panel(figure.add_subplot(), panel, last, COLOURS)
        file = io.BytesIO()
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    text = variables(file.getvalue().decode())
    _, opening, rest = text.partition("<svg ")
    inside, end, rest = rest.partition(">")
    return f"{opening}{inside}{end}<style>{SVG_STYLE}</style>{rest}".encode()


def draw_curves(record: Record, path: Path) -> None:
    """Losses and speed of one run as a PNG."""
    panels = [*loss_panels([record]), *speed_panels([record])[:1]]
    with mpl.rc_context({**RULES, "font.size": 9}):
        figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            draw_panel(axis, panel, record.step, COLOURS)
            axis.set_title(panel.title, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def draw_panel(axis: Axes, panel: Panel, last: int, colours: Colours) -> None:
    """Lines, the ends of the alignments and an axis whose numbers can be read."""
    for line in panel.lines:
        name = None if line.name is None else shortened(plain_text(line.name), 40)
        dotted = panel.dots or len(line.steps) == 1
        axis.plot(
            line.steps,
            line.values,
            color=colours.run(line.run),
            linestyle=DASHES[(line.style + line.run // len(colours.runs)) % len(DASHES)],
            linewidth=1.7,
            marker="o" if dotted else None,
            markersize=4.5,
            label=name,
        )
    for run, step in panel.ends.items():
        axis.axvline(step, color=colours.run(run), linestyle=(0, (2, 2)), linewidth=1.1)
        axis.plot(
            step,
            1.0,
            color=colours.run(run),
            marker="v",
            markersize=7,
            transform=axis.get_xaxis_transform(),
            clip_on=False,
        )
    if panel.level is not None:
        axis.axhline(panel.level, color=colours.ink, linestyle=(0, (4, 3)), linewidth=1)
    axis.set_xlabel("step", color=colours.ink)
    axis.set_xlim(0, max(last, 1) * 1.02)
    _set_height(axis, panel)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    if panel.unit == "bytes":
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: describe_bytes(value)))
    elif panel.unit == "share":
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    else:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axis.grid(axis="y", color=colours.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(color=colours.grid, labelcolor=colours.ink, length=3)
    for spine in axis.spines.values():
        spine.set_color(colours.grid)
    names = dict.fromkeys(line.name for line in panel.lines if line.name is not None)
    if names:
        handles, labels = axis.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))  # of several runs, one stands for all
        legend = axis.legend(
            list(shown.values()),
            list(shown),
            fontsize=9,
            frameon=False,
            labelcolor=colours.ink,
            handlelength=3,
            loc="best",
        )
        legend.set_zorder(1)


def highest_shown(panel: Panel) -> float | None:
    """Where a panel is cut off above, because its first numbers would flatten all others."""
    values = [value for line in panel.lines for value in line.values]
    later = [value for line in panel.lines for value in line.values[len(line.values) // 20 + 1 :]]
    if not panel.settles or len(later) < 20:
        return None
    low, high = min(values), max(later)
    top = high + 0.6 * (high - low)
    return top if max(values) > top else None


def _set_height(axis: Axes, panel: Panel) -> None:
    values = [value for line in panel.lines for value in line.values]
    if panel.level is not None:
        values.append(panel.level)
    low, high = min(values), max(values)
    cut = highest_shown(panel)
    if panel.from_zero and low >= 0:
        axis.set_ylim(0, 1.12 * high if high else 1.0)
        return
    top = high if cut is None else cut
    room = (top - low) * 0.07 or abs(low) * 0.05 or 1.0
    axis.set_ylim(low - room, top if cut is not None else top + room)
