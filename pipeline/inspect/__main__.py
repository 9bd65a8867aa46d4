"""`python -m pipeline.inspect STORE [--json]`, and what else there is to ask of a store:
`--sample KEY --png FILE`, `--verify`, `--gc`, `--check CONFIG...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline.cli.command import run_command
from pipeline.cli.options import parse_options
from pipeline.inspect.orphans import (
    collect,
    describe_collection,
    find_leftovers,
    is_cheap_to_list,
    summed,
)
from pipeline.inspect.summary import describe, summarise
from pipeline.inspect.verify import describe_verification, verify_store
from pipeline.store import Store
from schemas.errors import UserError
from schemas.inspect import InspectConfig


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
    if len(chosen) > 1 or (chosen and (config.sample or config.fidelity) is not None):
        raise UserError(f"--{chosen[0]} answers alone: leave the other questions to another call")
    store = Store.open(config.store)
    if config.verify:
        return _verify(store, config)
    if config.check:
        return _check(store, config)
    if config.gc:
        return _collect(store, config)
    summary = summarise(store)
    if config.sample is not None and config.png is not None:
        from pipeline.visualization.store_sample import (
            draw_sample,  # torch takes seconds that the page need not
        )

        draw_sample(store, config.sample, Path(config.png).expanduser(), config.stream)
        print(f"wrote {config.png}", file=sys.stderr)
    report, page = summary.as_json(), describe(store, summary, _garbage(store))
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


def _verify(store: Store, config: InspectConfig) -> int:
    found = verify_store(store, threads=config.threads)
    page = describe_verification(store, found)
    print(json.dumps(found.as_json()) if config.as_json else page)
    return 1 if found.damaged else 0


def _check(store: Store, config: InspectConfig) -> int:
    from pipeline.inspect.check import answers_as_json, check_configs  # imports torch

    answers = check_configs(store, config.check)
    found, lines = answers_as_json(answers), "\n".join(str(answer) for answer in answers)
    print(json.dumps(found) if config.as_json else lines)
    return 0 if found["ok"] else 1


def _collect(store: Store, config: InspectConfig) -> int:
    done = collect(store, hours=config.gc_age)
    page = describe_collection(store, done, hours=config.gc_age)
    print(json.dumps(done.as_json()) if config.as_json else page)
    return 0


def _garbage(store: Store) -> str | None:
    """How much there is, where finding out is cheap."""
    garbage = find_leftovers(store).garbage if is_cheap_to_list(store) else []
    return summed(garbage) if garbage else None


if __name__ == "__main__":
    run_command(main)
