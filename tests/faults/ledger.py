"""The results file: one line for each fault that was made, kept over all calls."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from schemas.base import Strict

RESULTS = "results.jsonl"


class Result(Strict):
    """One fault, and what became of the run that it struck."""

    seed: int
    run: int
    """Number of the run, which with the seed decides all that was drawn."""
    work: str
    habitat: str
    fault: str
    at: int
    """Progress at which it came."""
    survived: bool
    lost: int = 0
    """Samples, of the whole run; counted with its first fault."""
    duplicated: int = 0
    hung: bool = False
    seconds: float | None = None
    """From the fault to progress beyond what there was."""
    told: str = ""
    """What was wrong."""
    code: str = ""
    """Of the software that was tried: a digest of its source."""


class Ledger:
    """The results in a folder. A line that a kill cut short is dropped."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = folder / RESULTS
        self.seed = seed

    def results(self) -> list[Result]:
        """Those of this seed."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                found.append(Result.model_validate_json(line))
        return [result for result in found if result.seed == self.seed]

    def next_run(self) -> int:
        return max((result.run for result in self.results()), default=-1) + 1

    def append(self, results: Iterable[Result]) -> None:
        """All of a run's at once: a run that was broken off is done again."""
        lines = "".join(result.model_dump_json() + "\n" for result in results)
        with self.path.open("ab") as file:
            _cut_to_whole_lines(self.path)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())


def _cut_to_whole_lines(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
