"""`python -m pipeline.report RUN [RUN ...] --html FILE`: runs side by side on one page."""

from __future__ import annotations

import json
import sys
from collections import Counter

from pipeline.files import absolute_url, open_url, without_credentials, write_atomic
from pipeline.report.page import Report
from pipeline.report.records import read_run
from schemas.errors import UserError, plain_text, run_command
from schemas.options import parse_options
from schemas.report import ReportConfig


def main(argv: list[str]) -> int:
    config = parse_options(
        ReportConfig,
        argv,
        command="python -m pipeline.report",
        about="Write one page that compares runs: curves, samples, attention, speed, options.",
        positional="runs",
    )
    report, size = write_report(config)
    for warning in report.warnings:
        print(f"warning: {plain_text(warning)}", file=sys.stderr)
    assert config.html is not None
    where = without_credentials(config.html)
    runs = [
        {
            "name": label,
            "run": record.url,
            "step": record.step,
            "steps": record.steps,
            "termination_step": record.termination,
        }
        for label, record in zip(report.labels, report.records, strict=True)
    ]
    found = {"runs": runs, "html": where, "bytes": size, "warnings": report.warnings}
    print(json.dumps(found) if config.as_json else plain_text(where))
    return 0


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
    report = Report(records, draw_attention=config.attention == "auto")
    data = report.html().encode()
    write_atomic(filesystem, path, data)
    return report, len(data)


if __name__ == "__main__":
    run_command(main)
