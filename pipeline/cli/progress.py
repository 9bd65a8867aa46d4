"""Progress of a command: a bar on a terminal, else one line a minute, as logs of jobs want it."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakSet

from tqdm import tqdm

logger = logging.getLogger(__name__)

QUIET_SECONDS = 1.5
"""Seconds without output that need no explanation."""
LINE_SECONDS = 60.0
"""Seconds between two lines where stderr is no terminal."""
COUNT = "{{desc}}: {{n_fmt}}/{{total_fmt}}{unit} ({{percentage:.0f}}%)"
LINE = COUNT + ", {{rate_fmt}}, {{remaining}} left"


class ProgressLines(tqdm):  # type: ignore[type-arg]
    """A tqdm that writes whole lines and no carriage returns."""

    _instances: ClassVar[Any] = WeakSet()  # not among the bars that log lines are written above

    def __init__(self, *args: Any, **options: Any) -> None:
        unit = options.get("unit", "it")
        line = LINE.format(unit=unit if unit == "B" else f" {unit}s")
        options |= {"mininterval": LINE_SECONDS, "miniters": 1, "leave": False, "bar_format": line}
        super().__init__(*args, **options)

    @staticmethod
    def status_printer(file: Any) -> Any:
        def write(line: str) -> None:
            if line:
                file.write(line.strip() + "\n")
                file.flush()

        return write

    def clear(self, *_: Any, **__: Any) -> None:
        """A line stays."""

    def moveto(self, n: int) -> None:
        """Lines follow each other."""

    def close(self) -> None:
        if not self.disable:
            self.refresh()
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]


@contextmanager
def saying(text: str) -> Iterator[None]:
    """Log ``text`` where the work in the context takes more than ``QUIET_SECONDS``."""
    timer = threading.Timer(QUIET_SECONDS, logger.info, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def progress_bar(*args: Any, **options: Any) -> tqdm[Any]:
    """``tqdm(*args, **options)`` on stderr."""
    kind = tqdm if sys.stderr.isatty() else ProgressLines
    return kind(*args, file=sys.stderr, **options)
