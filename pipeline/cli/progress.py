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

from pipeline.text import describe_bytes, describe_hours

logger = logging.getLogger(__name__)

QUIET_SECONDS = 1.5
"""Seconds without output that need no explanation."""
LINE_SECONDS = 60.0
"""Seconds between two lines where stderr is no terminal."""
COUNT = "{desc}: {n_fmt}/{total_fmt}{plural} ({percentage:.0f}%)"


class ProgressLines(tqdm):  # type: ignore[type-arg]
    """A tqdm that writes whole lines and no carriage returns."""

    _instances: ClassVar[Any] = WeakSet()  # not among the bars that log lines are written above
    _shown: tuple[float, float | None] | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        options |= {"mininterval": LINE_SECONDS, "miniters": 1, "leave": False}
        super().__init__(*args, **options)

    def __str__(self) -> str:
        """The count; after the first items also rate and time left, at the end the time taken."""
        facts = self.format_dict
        plural = "B" if self.unit == "B" else f" {self.unit}s"
        done, total, elapsed = self.n - self.initial, self.total, facts["elapsed"]
        line = COUNT
        if done and self.n == total:
            line += f" in {describe_hours(elapsed / 3600)}"
        elif done:
            rate = facts["rate"] or done / max(elapsed, 1e-9)
            amount = describe_bytes(rate) if self.unit == "B" else f"{rate:.3g}{plural}"
            line += f", {amount}/s, {{remaining}} left"
        return str(self.format_meter(**{**facts, "bar_format": line, "plural": plural}))

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

    def __del__(self) -> None:
        """A bar that nothing has closed, as after Ctrl-C, has no last line."""
        self.disable = True

    def display(self, *args: Any, **options: Any) -> None:
        self._shown = (self.n, self.total)
        super().display(*args, **options)

    def close(self) -> None:
        if not self.disable:
            if self._shown != (self.n, self.total):
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
