"""The error that is meant for the person at the terminal, and how a command ends with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what to do about it."""


class StoppedError(Exception):
    """The command was asked to stop and did so in good order: the message says how to go on."""

    def __init__(self, message: str, code: int = 143) -> None:
        """``code`` is the exit code: 128 and the number of the signal that asked."""
        super().__init__(message)
        self.code = code


def plain_text(text: str) -> str:
    """``text`` in one line; what a terminal would obey, or not know, shown as its escape."""
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """The same with spaces as they are."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run_command(main: Callable[[list[str]], int]) -> None:
    """Run ``main(argv)`` as a command: a ``UserError`` is one line on stderr and exit code 2,
    a ``StoppedError`` one line and its own code. Whoever closes the pipe that the command prints
    to (``head``) has read enough: that is no error to speak of."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {plain_text(str(error))}", file=sys.stderr)
        code = 2
    except StoppedError as stop:
        print(plain_text(str(stop)), file=sys.stderr)
        code = stop.code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        code = 141  # as of a process that SIGPIPE ends
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
