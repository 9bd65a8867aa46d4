"""Metrics of a run in Ray's Prometheus endpoint, where docker/grafana reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.util.metrics import Gauge

from pipeline.runs.metrics import OBSERVERS

LOSSES = ("denoising", "feature", "attention", "class_token")
STREAM = "bytes_per_second_"
GAUGES = {
    "haste_step": ("Finished optimizer steps.", ()),
    "haste_phase": ("1: aligned with the teacher; 2: after the termination.", ()),
    "haste_images_per_second": ("Images per second of all workers.", ()),
    "haste_data_wait_share": ("Share of the time spent waiting for data, 0 to 1.", ()),
    "haste_grad_norm": ("L2 norm of the gradient before clipping.", ()),
    "haste_loss": ("Mean loss since the previous row.", ("loss",)),
    "haste_read_bytes_per_second": ("Bytes per second read of a stream.", ("stream",)),
}
"""Names, to which Ray adds ``ray_``, their help, and their tags besides ``run``."""


def measurements(row: Mapping[str, Any]) -> Iterator[tuple[str, float, dict[str, str]]]:
    """(name, value, tags) of a row of the metrics; an event has none. A stream that a row does not
    name any more has been closed by the termination."""
    if "event" in row:
        return
    for name in ("step", "phase", "images_per_second", "data_wait_share", "grad_norm"):
        if name in row:
            yield f"haste_{name}", row[name], {}
    for loss in LOSSES:
        if loss in row:
            yield "haste_loss", row[loss], {"loss": loss}
    for name, value in row.items():
        if name.startswith(STREAM):
            yield "haste_read_bytes_per_second", value, {"stream": name.removeprefix(STREAM)}


@contextmanager
def exported_metrics(run: str, gauge: Callable[..., Any] = Gauge) -> Iterator[None]:
    """Export every row that this process writes to the run's metrics."""
    gauges = {
        name: gauge(name, description=about, tag_keys=("run", *tags))
        for name, (about, tags) in GAUGES.items()
    }
    shown: set[tuple[str, tuple[tuple[str, str], ...]]] = set()

    def export(row: Mapping[str, Any]) -> None:
        found = list(measurements(row))
        present = {(name, tuple(tags.items())) for name, _, tags in found}
        for name, value, tags in found:
            gauges[name].set(value, tags={"run": run, **tags})
        if found:
            for name, pairs in shown - present:  # a gauge would show its last value for ever
                gauges[name].set(0.0, tags={"run": run, **dict(pairs)})
            shown.update(present)

    OBSERVERS.append(export)
    try:
        yield
    finally:
        OBSERVERS.remove(export)
