"""Entry point of every command: errors as one line, exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pipeline.cli.interrupts import answered_interrupts
from pipeline.cli.log_setup import LEVELS, set_up_logging
from schemas.errors import StoppedError, UserError, plain_text


def run_command(main: Callable[[list[str]], int]) -> None:
    """Run ``main(argv)`` as a command: a ``UserError`` is one line on stderr and exit code 2,
    a ``StoppedError`` one line and its own code. A closed stdout pipe (``head``) is not an error.
    Ctrl-C is answered at once, and is exit code 130.

    The option ``--log-level`` is the same for every command: it is taken out of ``argv`` here.
    """
    try:
        level, argv = _split_log_level(sys.argv[1:])
        set_up_logging(level)
        with answered_interrupts():
            code = main(argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {plain_text(str(error))}", file=sys.stderr)
        code = 2
    except StoppedError as stop:
        print(plain_text(str(stop)), file=sys.stderr)
        code = stop.code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        code = 141  # as for a process killed by SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _split_log_level(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of ``--log-level``, None where it is not given, and the other arguments."""
    level, rest = None, []
    arguments = iter(argv)
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option != "--log-level":
            rest.append(argument)
            continue
        level = value if equals else next(arguments, "")
        if level not in LEVELS:
            raise UserError(f"--log-level '{level}': choose one of {', '.join(LEVELS)}")
    return level, rest
