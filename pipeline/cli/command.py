"""The frame of every command: errors as one line, exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from schemas.errors import StoppedError, UserError, plain_text


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
