"""`python -m pipeline.inspect STORE [--json]`, and what else there is to ask of a store:
`--sample KEY --png FILE`, `--verify`, `--gc`, `--check CONFIG...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline.inspect.garbage import (
    collect,
    describe_collection,
    find_leftovers,
    is_cheap_to_list,
    summed,
)
from pipeline.inspect.summary import describe, summarise
from pipeline.inspect.verify import describe_verification, verify_store
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
    chosen = [name for name in ("verify", "gc", "check") if getattr(config, name)]
    if len(chosen) > 1 or (chosen and config.sample is not None):
        raise UserError(f"--{chosen[0]} answers alone: leave the other questions to another call")
    store = Store.open(config.store)
    if config.verify:
        found = verify_store(store, threads=config.threads)
        page = (
            json.dumps(found.as_json()) if config.as_json else describe_verification(store, found)
        )
        print(page)
        return 1 if found.damaged else 0
    if config.check:
        from pipeline.inspect.check import answers_as_json, check_configs  # imports torch

        answers = check_configs(store, config.check)
        lines = "\n".join(str(answer) for answer in answers)
        print(answers_as_json(answers) if config.as_json else lines)
        return 0 if all(answer.ok for answer in answers) else 1
    if config.gc:
        done = collect(store, hours=config.gc_age)
        page = describe_collection(store, done, hours=config.gc_age)
        print(json.dumps(done.as_json()) if config.as_json else page)
        return 0
    summary = summarise(store)
    if config.sample is not None and config.png is not None:
        from pipeline.inspect.draw import draw_sample  # torch takes seconds that the page need not

        draw_sample(store, config.sample, Path(config.png).expanduser())
        print(f"wrote {config.png}", file=sys.stderr)
    if config.as_json:
        print(json.dumps(summary.as_json()))
    else:
        print(describe(store, summary, _garbage(store)))
    return 0


def _garbage(store: Store) -> str | None:
    """How much there is, where finding out is cheap."""
    garbage = find_leftovers(store).garbage if is_cheap_to_list(store) else []
    return summed(garbage) if garbage else None


if __name__ == "__main__":
    run_command(main)
