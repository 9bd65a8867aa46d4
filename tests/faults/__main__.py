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
from tests.faults.ledger import Ledger, Result
from tests.faults.options import FaultOptions
from tests.faults.plan import draw
from tests.faults.reference import Reference
from tests.faults.session import Session
from tests.faults.table import as_json, page

MAX_EMPTY = 10
"""Runs in a row in which no fault hit anything."""


def main(argv: list[str]) -> int:
    options = parse_options(
        FaultOptions,
        argv,
        command="python -m tests.faults",
        about="Break extraction and training in seeded ways, and see whether they come to the same "
        "end as undisturbed. Results are kept below --store: run it again for more.\n\nfaults: "
        + ", ".join(FAULTS),
    )
    signal.signal(signal.SIGTERM, _interrupt)
    results = disturb(options)
    counts = as_json(results)
    print(json.dumps(counts) if options.as_json else page(results))
    return 0 if counts["survived"] == counts["faults"] else 1


def disturb(options: FaultOptions) -> list[Result]:
    """Make faults until the ledger has ``options.count``; all that it has then."""
    if options.store is None:
        raise UserError("--store is missing: the folder to work in")
    url = absolute_url(options.store)
    if "://" in url:
        raise UserError("--store: give a folder of this machine; S3 is a server of the harness")
    root = Path(url)
    root.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(root, options.seed)
    number, empty = ledger.next_run(), 0
    kinds = possible(options.faults)
    reference = Reference(root)
    reference.make()
    while (left := options.count - len(ledger.results())) > 0:
        plan = draw(options.seed, number, kinds)
        began = time.monotonic()
        results = Session(plan, options.seed, reference, root).run(most=left, keep=options.keep)
        ledger.append(results)
        _say(number, plan.work.name, plan.habitat, results, time.monotonic() - began)
        number += 1
        empty = 0 if results else empty + 1
        if empty == MAX_EMPTY:
            raise UserError(f"no fault hit anything in {empty} runs; see {root}")
    return ledger.results()


def possible(asked: Sequence[str]) -> list[str]:
    """Those of the faults that this machine can make. Raises ``UserError``."""
    for name in asked:
        if name not in FAULTS:
            raise UserError(f"there is no fault '{name}'{suggest(name, list(FAULTS))}; --help")
    kinds = []
    for name in asked or FAULTS:
        reason = FAULTS[name].not_here()
        if reason is None:
            kinds.append(name)
        else:
            print(f"{name} cannot be made here: {reason}", file=sys.stderr)
    if not kinds:
        raise UserError("none of these faults can be made on this machine")
    return kinds


def _say(number: int, work: str, habitat: str, results: Sequence[Result], seconds: float) -> None:
    made = ", ".join(
        f"{r.fault} at {r.at}{'' if r.survived else ' NOT SURVIVED'}"
        + (f" ({r.seconds:.0f} s)" if r.seconds is not None else "")
        for r in results
    )
    print(f"run {number}: {work}, {habitat}, {seconds:.0f} s: {made or 'none'}", file=sys.stderr)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main)
