"""How commands end."""

from __future__ import annotations

import subprocess
import sys

PRINTS = """
from pipeline.cli.command import run_command
def main(argv):
    print("x" * int(argv[0]))
    return 0
run_command(main)
"""


def test_a_reader_that_has_enough_is_no_error() -> None:
    """Whether the text is longer than a pipe holds, or lies in Python's buffer until the end."""
    for size in (10, 10_000_000):
        process = subprocess.Popen(
            [sys.executable, "-c", PRINTS, str(size)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(30) == 141
        process.stderr.close()
