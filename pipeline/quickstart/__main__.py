"""`python -m pipeline.quickstart --source DIR [--hours N] [--run] [--json]`."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.command import run_command
from pipeline.cli.interrupts import HANDED_ON, handing_on
from pipeline.cli.next_step import log_next
from pipeline.cli.options import parse_options
from pipeline.storage.redaction import redact
from schemas.errors import StoppedError, UserError
from schemas.quickstart import QuickstartConfig

if TYPE_CHECKING:
    from pipeline.quickstart.proposal import Proposal
    from pipeline.quickstart.survey import Survey

logger = logging.getLogger("pipeline.quickstart")

ABOUT = """\
From one's own images to pictures: look at the images and the machine, write a config for the
extraction and one for the training, with the reason of each choice, and print the three commands.

Without network and weights, the first command trains a small teacher and autoencoder on the images
themselves, and says what they know (k-NN accuracy, PSNR)."""


def main(argv: list[str]) -> int:
    config = parse_options(
        QuickstartConfig, argv, command="python -m pipeline.quickstart", about=ABOUT
    )
    if config.source is None:
        raise UserError("--source is missing: the folder, tars or zip of the images")
    from schemas.validation import validate

    work = Path(config.work or Path("runs", _name(config.source))).expanduser().absolute()
    existing = next(path for path in [work, *work.parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--work '{work}': '{existing}' is not a folder that can be written to")
    logger.info("looking at '%s'", redact(config.source))
    # torch takes seconds to import
    from pipeline.quickstart.machine import look_at_machine
    from pipeline.quickstart.proposal import propose
    from pipeline.quickstart.survey import conversion_advice, survey_source
    from schemas.extract import ExtractConfig
    from schemas.run import RunConfig

    survey = survey_source(config.source, work)
    machine = look_at_machine(work)
    proposal = propose(survey, machine, config.hours, work)
    files = []
    for name, options, model in (
        ("extract.yaml", proposal.extract, ExtractConfig),
        ("train.yaml", proposal.train, RunConfig),
    ):
        validate(model, options.values(), where=name)
        files.append(_write(work / name, options.text()))
    for warning in proposal.warnings:
        logger.warning("%s", warning)
    if survey.bad:
        logger.warning(
            "%d of %d examined files are not images or damaged, first %s (%s): they are left out%s",
            len(survey.bad),
            survey.examined,
            *survey.bad[0],
            conversion_advice(survey.bad),
        )
    found = {
        "images": survey.images,
        "classes": list(survey.names),
        "commands": [command.line for command in proposal.commands],
        "seconds": round(sum(command.seconds for command in proposal.commands)),
        "bytes": round(sum(command.bytes for command in proposal.commands)),
        "files": [str(file) for file in files],
    }
    print(
        json.dumps(found) if config.as_json else _page(survey, machine.describe(), proposal, files)
    )
    if config.run:
        sys.stdout.flush()
        for command in proposal.commands:
            _run(command.name, command.line)
        logger.info("pictures: %s", work / "samples.png")
        page = str(work / "report.html")
        run = str(work / "run")
        log_next("curves and attention on a page", "pipeline.report", run, "--html", page)
    return 0


def _name(source: str) -> str:
    """A name for a folder from the last part of a source."""
    last = redact(source).rstrip("/").rpartition("/")[2]
    stem = re.sub(r"(\.tar)?\.(zip|tar|gz|tgz|bz2|xz)$", "", last)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._") or "quickstart"


def _write(path: Path, text: str) -> Path:
    """Write a config; another one of this name is kept beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_bytes() != text.encode():
        old = path.with_suffix(".yaml.old")
        path.replace(old)
        logger.warning("%s had other options: they are now in %s", path, old.name)
    path.write_text(text, encoding="utf-8")
    return path


def _page(survey: Survey, machine: str, proposal: Proposal, files: list[Path]) -> str:
    from pipeline.text import counted, describe_bytes, describe_hours, shortened
    from schemas.errors import escaped

    names = ", ".join(shortened(survey.names[n], 40) for n in survey.with_images[:10])
    more = ", ..." if len(survey.with_images) > 10 else ""
    first = survey.sizes[0]
    sizes = "{}x{}".format(*first)
    if survey.mixed:
        sizes = f"of mixed sizes (median short side {survey.short_side} px)"
    lines = [
        f"{counted(survey.images, 'image')} in "
        f"{counted(len(survey.with_images), 'class', 'classes')} ({names}{more}), "
        f"{'grey' if survey.grey else 'colour'}, {sizes}; {len(survey.bad)} bad of "
        f"{survey.examined:,} examined",
        f"this machine: {machine}",
        *proposal.notes,
        f"reasons of all choices: {', '.join(str(file) for file in files)}",
        "",
    ]
    for number, command in enumerate(proposal.commands, 1):
        lines += [
            f"{number}. {command.name}: about {describe_hours(command.seconds / 3600, 2)}, writes "
            f"{describe_bytes(command.bytes)}, {describe_bytes(command.memory)} of memory",
            f"   {command.line}",
        ]
    total = sum(command.seconds for command in proposal.commands)
    extract, train = (shlex.quote(str(file)) for file in files)
    lines += [
        f"in all about {describe_hours(total / 3600, 2)}; --run runs the three",
        "what other cuts of the teacher would cost:",
        f"   {proposal.commands[0].line.partition(' --config ')[0]} --plan --config {extract} "
        f"--plan.trainer {train}",
    ]
    return "\n".join(escaped(line) for line in lines)


def _run(name: str, line: str) -> None:
    """Run one of the commands; its results go to stderr, because stdout has the proposal. Raises
    ``StoppedError`` with its exit code where it fails."""
    logger.info("%s: %s", name, line)
    # of its own group, so that it receives each signal once, from here, and answers it itself
    with subprocess.Popen(shlex.split(line), stdout=sys.stderr, process_group=0) as process:
        try:
            with handing_on(process.send_signal):
                code = process.wait()
        except BaseException:  # such as a Ctrl-C before signals were handed on
            process.terminate()
            raise
    stopped = -code if code < 0 else code - 128
    if stopped in HANDED_ON:
        raise StoppedError(
            f"the {name} command was stopped; run the same command again to continue", 128 + stopped
        )
    if code:
        raise StoppedError(
            f"the {name} command failed (exit code {code}); run the same command again to continue",
            code if code > 0 else 128 - code,
        )


if __name__ == "__main__":
    run_command(main)
