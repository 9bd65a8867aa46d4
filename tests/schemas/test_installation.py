"""Commands under a Python that lacks the project's packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("pipeline", "jobs", "schemas")
    for path in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)
MODULES = [
    name.removesuffix(".py").removesuffix("/__main__").replace("/", ".") for name in PROGRAMS
]
FILES = [name for name in PROGRAMS if name.startswith("jobs/")]


def run(*arguments: str, code: int = 2) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("command", [*(["-m", name] for name in MODULES), *([f] for f in FILES)])
def test_without_packages_a_command_says_make_install(command: list[str]) -> None:
    """``-S`` hides the installed packages."""
    assert re.fullmatch(
        r"error: package '\w+' is not installed: run `make install`, then use .venv/bin/python\n",
        run("-S", *command),
    )


def test_every_kind_of_program_is_tried() -> None:
    assert {"pipeline.extract", "pipeline.inspect", "jobs.demo", "schemas.json_schema"} < {*MODULES}
    assert "jobs/pretrain/self_distill.py" in FILES


@pytest.mark.parametrize("missing", ["import nothing_like_it", "import schemas.nothing"])
def test_other_failed_imports_are_tracebacks(missing: str, tmp_path: Path) -> None:
    """Missing modules of another program that uses the project, and of the project itself."""
    text = run("-c", f"import schemas\n{missing}", code=1)
    assert text.startswith("Traceback")
