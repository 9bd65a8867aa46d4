"""`python -m pipeline.report RUN [RUN ...] --html FILE`: a page that compares runs."""

from __future__ import annotations

import json
import logging

from pipeline.cli.command import run_command
from pipeline.cli.options import parse_options
from schemas.errors import plain_text
from schemas.report import ReportConfig

logger = logging.getLogger("pipeline.report")


def main(argv: list[str]) -> int:
    config = parse_options(
        ReportConfig,
        argv,
        command="python -m pipeline.report",
        about="Write one page that compares runs: curves, samples, attention, speed, options.",
        positional="runs",
    )
    from pipeline.report.page import write_report
    from pipeline.storage.files import redact

    report, size = write_report(config)
    for warning in report.warnings:
        logger.warning("%s", plain_text(warning))
    assert config.html is not None
    html = redact(config.html)
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
    result = {"runs": runs, "html": html, "bytes": size, "warnings": report.warnings}
    print(json.dumps(result) if config.as_json else plain_text(html))
    return 0


if __name__ == "__main__":
    run_command(main)
