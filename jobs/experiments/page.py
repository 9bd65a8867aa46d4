"""`python jobs/experiments/page.py [FOLDER NAME]`: the tables of jobs/experiments/README.md.

With FOLDER, the --output of an experiment, its results and figures are first copied to
``results/NAME.json``, ``NAME_curves.png`` and ``NAME_cosine.png``.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

if not __package__:  # run as a file: Python then searches this folder, not the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import jobs  # noqa: F401  (reports packages that are not installed)

from jobs.experiments.results import tables
from pipeline.cli.command import run_command
from pipeline.cli.options import parse_options
from schemas.base import Strict
from schemas.errors import UserError
from schemas.fields import Name

PAGE = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results")
END = "<!-- end -->"


def begin(name: str) -> str:
    """The line before the tables of a file of results."""
    return f"<!-- tables of results/{name}.json -->"


def names(text: str) -> list[str]:
    """The files that a page has parts for."""
    return re.findall(re.escape(begin("NAME")).replace("NAME", r"([\w.-]+)"), text)


def page_with_tables(text: str, results: Path) -> str:
    """The page with the tables of every file. Raises ``UserError`` for a file without a part, and
    for a part without a file."""
    for path in sorted(results.glob("*.json")):
        if path.stem not in names(text):
            raise UserError(f"the page has no part '{path.stem}': add {begin(path.stem)} and {END}")
    for name in names(text):
        path = results / f"{name}.json"
        if not path.exists():
            raise UserError(f"there is no {path}, which the page has a part for")
        head, _, rest = text.partition(f"{begin(name)}\n")
        _, _, tail = rest.partition(END)
        text = f"{head}{begin(name)}\n{tables(json.loads(path.read_text()))}{END}{tail}"
    return text


class PageOptions(Strict):
    """Results to add to the page."""

    output: str | None = None
    """The --output of an experiment, whose results and figures are copied first."""
    name: Name | None = None
    """Name of the copied results: that of a part of the page."""


def main(argv: list[str]) -> int:
    options = parse_options(
        PageOptions,
        argv,
        command="python jobs/experiments/page.py",
        about="Write the tables of jobs/experiments/README.md from its folder results.",
        positional=("output", "name"),
    )
    if (options.output is None) != (options.name is None):
        raise UserError("expected nothing, or FOLDER NAME: the --output of an experiment")
    if options.output is not None:
        folder, name = Path(options.output), options.name
        if not (folder / "results.json").is_file():
            raise UserError(f"'{folder}' has no results.json: expected the --output of matrix.py")
        RESULTS.mkdir(exist_ok=True)
        for source, target in (
            ("results.json", f"{name}.json"),
            ("curves.png", f"{name}_curves.png"),
            ("cosine.png", f"{name}_cosine.png"),
        ):
            if (folder / source).exists():
                shutil.copyfile(folder / source, RESULTS / target)
    PAGE.write_text(page_with_tables(PAGE.read_text(), RESULTS))
    print(PAGE)
    return 0


if __name__ == "__main__":
    run_command(main)
