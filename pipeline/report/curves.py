"""Loss curves of a run, the termination marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOSSES = {
    "denoising": "denoising loss",
    "feature": "feature loss (-cosine)",
    "attention": "attention cross-entropy",
}


def draw_curves(rows: Sequence[dict[str, Any]], path: Path, *, termination: int | None) -> None:
    """Losses and speed over steps, from the rows of ``metrics.jsonl``."""
    measured = [row for row in rows if "steps_per_second" in row]
    panels = [name for name in LOSSES if any(name in row for row in measured)]
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(3.6 * (len(panels) + 1), 3.2))
    for axis, name in zip(axes, panels, strict=False):
        points = [(row["step"], row[name]) for row in measured if name in row]
        axis.plot(*zip(*points, strict=True), linewidth=1.5)
        axis.set_title(LOSSES[name], fontsize=10)
    speed = [(row["step"], row["steps_per_second"]) for row in measured]
    axes[-1].plot(*zip(*speed, strict=True), linewidth=1.5, color="tab:green")
    axes[-1].set_title("steps per second", fontsize=10)
    axes[-1].set_ylim(0, 1.2 * max(rate for _, rate in speed))
    last = max(row["step"] for row in measured)
    for axis in axes:
        axis.set_xlabel("step")
        axis.set_xlim(0, last)
        axis.grid(alpha=0.3)
        if termination is not None:
            axis.axvline(termination, color="tab:red", linestyle="--", linewidth=1)
            axis.text(
                termination,
                0.97,
                " alignment ends",
                color="tab:red",
                fontsize=8,
                va="top",
                transform=axis.get_xaxis_transform(),
            )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
