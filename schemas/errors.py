"""The error that is meant for the person at the terminal, and how a command ends with it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what to do about it."""


def plain_text(text: str) -> str:
    """``text`` in one line; what a terminal would obey, or not know, shown as its escape."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def run_command(main: Callable[[list[str]], int]) -> None:
    """Run ``main(argv)`` as a command: a ``UserError`` is one line on stderr and exit code 2."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {plain_text(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
