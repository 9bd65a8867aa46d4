"""Logging set-up of a command: one handler on stderr that does not disturb progress bars."""

from __future__ import annotations

import logging
import os
import sys

LEVELS = ("debug", "info", "warning", "error")
LEVEL_VARIABLE = "HASTE_LOG_LEVEL"
"""Environment variable that hands the level on to processes that a command starts."""
FORMAT = "%(asctime)s %(levelname)s %(message)s"


class StderrHandler(logging.Handler):
    """Writes to the current ``sys.stderr``, above any progress bar that is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            tqdm = sys.modules.get("tqdm")  # without it there is no progress bar
            if tqdm is not None and tqdm.tqdm._instances:
                tqdm.tqdm.write(line, file=sys.stderr)
            else:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
        except BrokenPipeError:  # the reader of stderr was closed: the command continues
            pass
        except Exception:
            self.handleError(record)


def set_up_logging(level: str | None = None) -> None:
    """Send the project's log records of ``level`` and above to stderr; calling it again changes the
    level only.

    ``level`` is one of ``LEVELS``; the default is that of the command that started this process,
    else "info". Other libraries' loggers stay as they are.
    """
    level = level or os.environ.get(LEVEL_VARIABLE, "info")
    os.environ[LEVEL_VARIABLE] = level
    for name in ("pipeline", "jobs"):
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
            handler = StderrHandler()
            handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
            logger.addHandler(handler)
