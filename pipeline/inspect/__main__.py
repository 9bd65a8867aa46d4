"""`python -m pipeline.inspect STORE [--json] [--sample KEY --png FILE]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline.inspect.summary import describe, summarise
from pipeline.store import Store
from schemas.errors import UserError, run_command
from schemas.inspect import InspectConfig
from schemas.options import parse_options


def main(argv: list[str]) -> int:
    config = parse_options(
        InspectConfig,
        argv,
        command="python -m pipeline.inspect",
        about="Say what a store is, how much it holds and what is missing.",
        positional="store",
    )
    if config.store is None:
        raise UserError("STORE is missing: the folder or URL of the store")
    if (config.sample is None) != (config.png is None):
        raise UserError("--sample KEY and --png FILE go together")
    store = Store.open(config.store)
    summary = summarise(store)
    if config.sample is not None and config.png is not None:
        from pipeline.inspect.draw import draw_sample  # torch takes seconds that the page need not

        draw_sample(store, config.sample, Path(config.png).expanduser(), config.stream)
        print(f"wrote {config.png}", file=sys.stderr)
    report, page = summary.as_json(), describe(store, summary)
    if config.fidelity is not None:
        from pipeline.inspect.fidelity import describe_fidelity, measure_fidelity

        found = measure_fidelity(
            store,
            config.fidelity,
            stream=config.stream,
            source=config.source,
            weights=config.teacher.weights,
        )
        report, page = found.as_json(summary), f"{page}\n{describe_fidelity(found, summary)}"
    print(json.dumps(report) if config.as_json else page)
    return 0


if __name__ == "__main__":
    run_command(main)
