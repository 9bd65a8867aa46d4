"""Commands in forks of one process that has imported the light packages which all of them need.

A new Python takes half a second for these imports; a fork runs the same module as ``__main__``,
with arguments, environment, streams and exit code of its own.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]
LIGHT = ("schemas.run", "schemas.extract", "schemas.sample", "pipeline.cli.command")
LIGHT += ("pipeline.cli.options", "tests.bench.options")


@dataclass(frozen=True)
class Ended:
    """A command that has ended: exit code, streams, and packages that it had imported."""

    code: int
    out: str
    err: str
    packages: frozenset[str]


class CommandServer:
    """A process in the project's folder that forks for each command."""

    def __enter__(self) -> CommandServer:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=30)

    def run(self, words: list[str], **environment: str) -> Ended:
        """The command ``python WORDS``, with these variables beside those of the server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            request = {"words": words, "folder": folder, "environment": environment}
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            out, err, names = (Path(folder, name).read_text() for name in ("out", "err", "names"))
        return Ended(code, out, err, frozenset(names.split()))


def _serve() -> None:
    for name in LIGHT:
        __import__(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(**request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """End this process as ``python WORDS`` would; ``folder`` gets its streams and packages."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.update(environment)
    code = _code(words)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    Path(folder, "names").write_text(" ".join({name.partition(".")[0] for name in sys.modules}))
    os._exit(code)


def _code(words: list[str]) -> int:
    try:
        if words[0] == "-m":
            sys.argv[:] = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code: Any = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
        return code if isinstance(code, int) else int(code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _serve()
