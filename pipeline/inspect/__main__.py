"""`python -m pipeline.inspect STORE [--json]`: summary of a store; with `--png FILE` and
`--sample KEY`, `--fidelity N`, `--verify`, `--gc` or `--check CONFIG...` further checks."""

from __future__ import annotations

import json
import logging
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.command import run_command
from pipeline.cli.config_files import read_yaml
from pipeline.cli.next_step import log_next, training_beside
from pipeline.cli.options import parse_options
from schemas.errors import UserError, plain_text
from schemas.inspect import InspectConfig
from schemas.run import RunConfig
from schemas.validation import validate

if TYPE_CHECKING:
    from pipeline.store import Store

logger = logging.getLogger("pipeline.inspect")

SHIPPED = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def main(argv: list[str]) -> int:
    config = parse_options(
        InspectConfig,
        _with_shipped(_with_recipe(argv)),
        command="python -m pipeline.inspect",
        about="Describe a store: its contents, its sizes and what is missing.",
        positional="store",
    )
    if config.store is None:
        raise UserError("STORE is missing: the folder or URL of the store")
    if config.sample is not None and config.png is None:
        raise UserError("--sample KEY and --png FILE go together")
    chosen = [name for name in ("verify", "gc", "check") if getattr(config, name)]
    if len(chosen) > 1 or (chosen and (config.png or config.fidelity) is not None):
        raise UserError(
            f"--{chosen[0]} cannot be combined with --verify, --gc, --check, --sample, --png or "
            "--fidelity"
        )
    if config.recipe is not None and (config.fidelity is None or config.stream is not None):
        raise UserError("--recipe FILE goes with --fidelity N, and names the streams itself")
    from pipeline.inspect.summary import describe, summarise
    from pipeline.store import Store

    store = Store.open(config.store)
    if config.verify:
        return _verify(store, config)
    if config.check:
        logger.info("comparing configs with the store")
        return _check(store, config)
    if config.gc:
        return _remove_orphans(store, config)
    summary = summarise(store)
    captions: list[str] = []
    broken = False
    if (config.png or config.fidelity) is not None:  # these import torch, slowly
        logger.info("opening %s", store.shown_url)
    if config.sample is not None and config.png is not None:
        from pipeline.visualization.store_sample import draw_sample, find_sample, read_captions

        draw_sample(store, config.sample, Path(config.png).expanduser(), config.stream)
        logger.info("wrote %s", config.png)
        captions = read_captions(store, *find_sample(store, config.sample))
    elif config.png is not None:
        from pipeline.visualization.contact_sheet import draw_contact_sheet

        images = draw_contact_sheet(store, Path(config.png).expanduser())
        logger.info("wrote %s: %d decoded latents, a row for each class", config.png, images)
    report, page = summary.as_json(), describe(store, summary, _count_orphans(store))
    if captions:
        report["captions"] = captions
        page += "".join(f"\n  caption {n}    {plain_text(text)}" for n, text in enumerate(captions))
    if config.fidelity is not None:
        from pipeline.inspect.fidelity import describe_fidelity, measure_config, measure_fidelity

        if config.recipe is not None:
            run = validate(RunConfig, read_yaml(config.recipe), where=config.recipe)
            places = {"source": config.source, "weights": config.teacher.weights}
            streams = measure_config(store, run, config.fidelity, **places)
            report = {at: one.as_json(summary) for at, one in streams.items()}
            pages = [f"{at}: {describe_fidelity(one, summary)}" for at, one in streams.items()]
            print(json.dumps(report) if config.as_json else "\n".join([page, *pages]))
            return 0
        found = measure_fidelity(
            store,
            config.fidelity,
            stream=config.stream,
            source=config.source,
            weights=config.teacher.weights,
        )
        report, page = found.as_json(summary), f"{page}\n{describe_fidelity(found, summary)}"
        broken = found.kept is False
        if config.stream is None and store.manifest.text_streams:
            from pipeline.inspect.text_fidelity import measure_texts

            texts = list(measure_texts(store, config.fidelity))
            report["captions"] = [one.as_json() for one in texts if not isinstance(one, str)]
            page = "\n".join([page, *map(str, texts)])
    print(json.dumps(report) if config.as_json else page)
    if summary.complete and not broken:
        sys.stdout.flush()
        if (train := training_beside(store.url)) is not None:
            log_next("the training", "jobs/train_haste.py", "--config", train)
        else:
            log_next("configs that it can train", "pipeline.inspect", store.shown_url, "--check")
    return 1 if broken else 0


def _with_recipe(argv: list[str]) -> list[str]:
    """With --fidelity, --config names a training config, as --recipe does; without it, a file of
    the options of this command."""
    if not any(word.partition("=")[0] == "--fidelity" for word in argv):
        return argv
    return [
        "--recipe" + word.removeprefix("--config") if word.partition("=")[0] == "--config" else word
        for word in argv
    ]


def _with_shipped(argv: list[str]) -> list[str]:
    """--check without a file stands for all configs that the project has."""
    shipped: list[str] = []
    for word, following in pairwise([*argv, "--"]):
        alone = word == "--check" and following.startswith("--")
        shipped += [word, *([str(SHIPPED)] if alone else [])]
    return shipped


def _verify(store: Store, config: InspectConfig) -> int:
    from pipeline.inspect.verify import describe_verification, verify_store

    found = verify_store(store, threads=config.threads)
    page = describe_verification(store, found)
    print(json.dumps(found.as_json()) if config.as_json else page)
    return 1 if found.damaged else 0


def _check(store: Store, config: InspectConfig) -> int:
    from pipeline.inspect.check import answers_as_json, answers_as_table, check_configs  # torch

    answers = check_configs(store, config.check)
    found, lines = answers_as_json(answers), "\n".join(str(answer) for answer in answers)
    if config.check == (str(SHIPPED),):
        lines = answers_as_table(store, answers)
    print(json.dumps(found) if config.as_json else lines)
    sys.stdout.flush()
    suitable = next((answer for answer in answers if answer.by_options), None)
    if suitable is not None:
        options = ("--config", suitable.config, "--store", store.shown_url, *suitable.options)
        log_next("the training", "jobs/train_haste.py", *options)
    elif (train := training_beside(store.url)) is not None:
        log_next("the training that quickstart wrote", "jobs/train_haste.py", "--config", train)
    return 0 if found["ok"] else 1


def _remove_orphans(store: Store, config: InspectConfig) -> int:
    from pipeline.inspect.orphans import describe_removal, remove_orphans

    done = remove_orphans(store, hours=config.gc_age)
    page = describe_removal(store, done, hours=config.gc_age)
    print(json.dumps(done.as_json()) if config.as_json else page)
    return 0


def _count_orphans(store: Store) -> str | None:
    """Number and size of the orphans; None without any, or if listing the store is expensive."""
    from pipeline.inspect.orphans import count_and_size, find_orphans, is_cheap_to_list

    orphans = find_orphans(store).removable if is_cheap_to_list(store) else []
    return count_and_size(orphans) if orphans else None


if __name__ == "__main__":
    run_command(main)
