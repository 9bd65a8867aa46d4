"""One line instead of a traceback where Python or the installed packages are not the project's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import TracebackType

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OWN = ("schemas", "pipeline", "jobs", "tests")
ADVICE = "run `make install`, then use .venv/bin/python"


def report_missing_packages() -> None:
    """Make an uncaught import of a package that is not installed, by a file of this project, one
    line and exit code 2; costs imports nothing. Ctrl-C while a command of this project imports is
    one line too. Exits at once if Python is too old."""
    if sys.version_info < (3, 11):  # noqa: UP036  (pip has not checked it)
        print(f"error: Python 3.11 or later is needed: {ADVICE}", file=sys.stderr)
        raise SystemExit(2)
    if getattr(sys.excepthook, "__module__", None) == __name__:
        return
    before = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ModuleNotFoundError) and _is_ours(error.name, traceback):
            package = (error.name or "").partition(".")[0]
            sys.stdout.flush()
            print(f"error: package '{package}' is not installed: {ADVICE}", file=sys.stderr)
            raise SystemExit(2)
        if isinstance(error, KeyboardInterrupt) and _in_project(next(_files(traceback), "")):
            print("interrupted", file=sys.stderr)
            return
        before(kind, error, traceback)

    sys.excepthook = hook


def _is_ours(module: str | None, traceback: TracebackType | None) -> bool:
    """True if a file of this project imports a ``module`` of another project."""
    *_, file = "", *_files(traceback)
    return _in_project(file) and (module or "").partition(".")[0] not in ("", *OWN)


def _files(traceback: TracebackType | None) -> Iterator[str]:
    """Files of the frames, the program's first, without those of Python's import system."""
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if not name.startswith("<frozen "):
            yield name
        traceback = traceback.tb_next


def _in_project(file: str) -> bool:
    return os.path.relpath(os.path.abspath(file), ROOT).split(os.sep)[0] in OWN
