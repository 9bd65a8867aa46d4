"""`python -m tests.faults --store FOLDER [--count N] [--seed S] [--json]`."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.command import run_command
from pipeline.cli.options import parse_options
from pipeline.storage.files import absolute_url
from schemas.errors import UserError
from schemas.validation import suggest
from tests.faults.faults import FAULTS
from tests.faults.options import FaultOptions
from tests.faults.plan import draw
from tests.faults.results_log import Result, ResultsLog
from tests.faults.table import as_json, page

MAX_EMPTY = 10
"""Consecutive runs without a fault that found a target."""


def main(argv: list[str]) -> int:
    options = parse_options(
        FaultOptions,
        argv,
        command="python -m tests.faults",
        about="Inject seeded faults into extraction and training, and compare the results with "
        "those of undisturbed runs. Results are stored below --store: run it again to add more."
        "\n\nfaults: " + ", ".join(FAULTS),
    )
    signal.signal(signal.SIGTERM, _interrupt)
    results = disturb(options)
    counts = as_json(results)
    print(json.dumps(counts) if options.as_json else page(results))
    return 0 if counts["survived"] == counts["faults"] else 1


def disturb(options: FaultOptions) -> list[Result]:
    """Inject faults until the results log has ``options.count`` results; returns all of them."""
    if options.store is None:
        raise UserError("--store is missing: the folder to work in")
    url = absolute_url(options.store)
    if "://" in url:
        raise UserError("--store: give a local folder; the harness starts its own S3 server")
    from tests.faults.reference import Reference  # torch takes seconds to import
    from tests.faults.session import Session

    root = Path(url)
    root.mkdir(parents=True, exist_ok=True)
    results_log = ResultsLog(root, options.seed)
    number, empty = results_log.next_run(), 0
    kinds = available(options.faults)
    reference = Reference(root)
    reference.make()
    while (left := options.count - len(results_log.results())) > 0:
        plan = draw(options.seed, number, kinds)
        began = time.monotonic()
        results = Session(plan, options.seed, reference, root).run(
            max_faults=left, keep=options.keep
        )
        results_log.append(results)
        _report_run(number, plan.work.name, plan.environment, results, time.monotonic() - began)
        number += 1
        empty = 0 if results else empty + 1
        if empty == MAX_EMPTY:
            raise UserError(f"no fault found a target in {empty} runs; see {root}")
    return results_log.results()


def available(requested: Sequence[str]) -> list[str]:
    """Requested faults (default: all) that this machine can inject. Raises ``UserError``."""
    for name in requested:
        if name not in FAULTS:
            raise UserError(f"there is no fault '{name}'{suggest(name, list(FAULTS))}; --help")
    kinds = []
    for name in requested or FAULTS:
        reason = FAULTS[name].unavailable()
        if reason is None:
            kinds.append(name)
        else:
            print(f"{name} is not available: {reason}", file=sys.stderr)
    if not kinds:
        raise UserError("none of these faults is available on this machine")
    return kinds


def _report_run(
    number: int, work: str, environment: str, results: Sequence[Result], seconds: float
) -> None:
    made = ", ".join(
        f"{r.fault} at {r.at}{'' if r.survived else ' NOT SURVIVED'}"
        + (f" ({r.seconds:.0f} s)" if r.seconds is not None else "")
        for r in results
    )
    print(
        f"run {number}: {work}, {environment}, {seconds:.0f} s: {made or 'none'}", file=sys.stderr
    )


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main)
