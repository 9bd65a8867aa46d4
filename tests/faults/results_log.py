"""The results file: one line for each injected fault, appended over all calls."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from schemas.base import Strict

RESULTS = "results.jsonl"


class Result(Strict):
    """One fault and the outcome of its run."""

    seed: int
    run: int
    """Number of the run; with the seed it determines the plan."""
    work: str
    environment: str
    fault: str
    at: int
    """Progress at which it was injected."""
    survived: bool
    lost: int = 0
    """Lost samples of the run; counted in its first fault only."""
    duplicated: int = 0
    """Samples seen twice, counted likewise."""
    hung: bool = False
    seconds: float | None = None
    """From the fault to progress beyond that before it."""
    problem: str = ""
    """Description of the failure."""
    code: str = ""
    """Digest of the source of the tested software."""


class ResultsLog:
    """The results in a folder. An incomplete last line is dropped."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = folder / RESULTS
        self.seed = seed

    def results(self) -> list[Result]:
        """Results of this seed."""
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
        """Append all results of a run at once, because an interrupted run is repeated."""
        lines = "".join(result.model_dump_json() + "\n" for result in results)
        with self.path.open("ab") as file:
            _drop_incomplete_line(self.path)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())


def _drop_incomplete_line(path: Path) -> None:
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
