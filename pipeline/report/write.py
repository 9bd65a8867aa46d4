"""From the folders of runs to a page."""

from __future__ import annotations

from collections import Counter

from pipeline.report.page import Report
from pipeline.runs.reader import read_run
from pipeline.storage.files import (
    absolute_url,
    open_url,
    without_credentials,
    write_atomic,
)
from schemas.errors import UserError
from schemas.report import ReportConfig


def write_report(config: ReportConfig) -> tuple[Report, int]:
    """Write the page; what it is made of, and its bytes. Raises ``UserError``."""
    if not config.runs:
        raise UserError("RUN is missing: the folder of a run, or of several")
    if config.html is None:
        raise UserError("--html is missing: the page to write")
    named = Counter(absolute_url(run).rstrip("/") for run in config.runs)
    for run, times in named.items():
        if times > 1:
            raise UserError(f"RUN '{without_credentials(run)}' is named {times} times")
    filesystem, path = open_url(absolute_url(config.html), what="--html")
    records = [read_run(run) for run in config.runs]
    report = Report(records, attention=config.attention)
    data = report.html().encode()
    write_atomic(filesystem, path, data)
    return report, len(data)
