"""Proposals of the next command, as lines that run as they stand."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

from pipeline.cli.config_files import read_yaml
from pipeline.storage.redaction import redact
from schemas.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

logger = logging.getLogger(__name__)


def log_next(purpose: str, program: str, *words: str) -> None:
    """Log the command that users mostly want next, without credentials in its words."""
    logger.info("next, %s: %s", purpose, command_line(program, *map(redact, words)))


def command_line(program: str, *words: str) -> str:
    """A command for this folder and this Python; ``program`` is a module, or a file below the root
    of the project."""
    if program.endswith(".py"):
        here = program if Path.cwd() == ROOT else str(ROOT / program)
        return shlex.join([_python(), here, *words])
    # a script has put the root on the search path of its own process alone
    by_script = getattr(sys.modules["__main__"], "__spec__", None) is None
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    missing = by_script and Path.cwd() != ROOT and str(ROOT) not in paths
    prefix = f"PYTHONPATH={shlex.quote(str(ROOT))} " if missing else ""
    return prefix + shlex.join([_python(), "-m", program, *words])


def training_beside(store: str) -> str | None:
    """The config that ``pipeline.quickstart`` has written for the training on a store."""
    path = Path(store).parent / "train.yaml"
    try:
        mine = path.is_file() and read_yaml(path).get("store") == store
    except UserError:
        return None
    return str(path) if mine else None


def without_options(argv: Iterable[str], names: Collection[str]) -> list[str]:
    """The arguments without the options, or tables of options, of these names and their values."""
    kept, dropping = [], False
    for word in argv:
        if word.startswith("--"):
            name = re.split(r"[=.]", word.removeprefix("--"))[0]
            dropping = name.replace("-", "_") in names
        if not dropping:
            kept.append(word)
    return kept


def _python() -> str:
    """``python`` where that is this interpreter, else its path."""
    found = shutil.which("python")
    same = found is not None and os.path.abspath(found) == os.path.abspath(sys.executable)
    return "python" if same else sys.executable
