"""Which of a run's checkpoints to go on from: the newest one that is whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from pipeline.checkpoints.integrity import (
    DamagedCheckpointError,
    UnfinishedCheckpointError,
    parse_state_json,
    verify,
)
from pipeline.checkpoints.state import CheckpointState, parse_state
from schemas.errors import UserError, plain_text

PREFIX = "checkpoint-"
Write = Callable[[Path], None]
"""Fills an empty folder with a checkpoint."""


class Checkpoints(Protocol):
    """The checkpoints of one run, wherever they lie. One process at a time saves."""

    def save(self, step: int, write: Write) -> None:
        """Keep what ``write`` makes as the checkpoint of a step: all of it, or nothing."""

    def steps(self) -> list[int]:
        """Of all that are there, whole or not; oldest first."""

    def where(self, step: int) -> str:
        """Path or URL, for people."""

    def state(self, step: int) -> bytes:
        """Its ``state.json``. Raises ``DamagedCheckpointError`` where there is none."""

    def fetch(self, step: int, scratch: Path) -> Path:
        """A local folder with all its files: its own or, below ``scratch``, a copy."""


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step:09d}"


def steps_of(names: Iterable[str]) -> list[int]:
    """Steps of the folders among ``names`` that are checkpoints, oldest first."""
    found = (re.fullmatch(rf"{PREFIX}(\d+)", name) for name in names)
    return sorted(int(match[1]) for match in found if match is not None)


def to_prune(steps: Iterable[int], newest: int, keep: int) -> list[int]:
    """Those to remove once ``newest`` is there: all but the last ``keep``. Later ones were passed
    over as damaged, or given up, when the run went on from an earlier one."""
    steps = sorted(steps)
    earlier = [step for step in steps if step <= newest]
    return earlier[:-keep] + [step for step in steps if step > newest]


def latest_valid(checkpoints: Checkpoints, scratch: Path) -> tuple[int, Path] | None:
    """Step and local folder of the newest checkpoint whose every byte is as it was written, or
    None where the run has no checkpoint yet, if only one whose upload was cut off.

    Damaged ones are named on stderr and passed over. Raises ``UserError`` where all are damaged.
    """
    steps = checkpoints.steps()
    damaged = False
    for step in reversed(steps):
        try:
            folder = checkpoints.fetch(step, scratch)
            verify(folder)
        except DamagedCheckpointError as error:
            _say(error, step, steps)
            damaged = damaged or not isinstance(error, UnfinishedCheckpointError)
        else:
            return step, folder
    if damaged:
        raise _none_is_whole(checkpoints, steps)
    return None


def latest_state(checkpoints: Checkpoints) -> CheckpointState | None:
    """The state in the newest checkpoint whose ``state.json`` is whole: a first look, cheap even
    where checkpoints are large and far away. Raises as ``latest_valid``."""
    steps = checkpoints.steps()
    damaged = False
    for step in reversed(steps):
        where = checkpoints.where(step)
        try:
            return parse_state(parse_state_json(checkpoints.state(step), where), where)
        except UnfinishedCheckpointError:
            continue
        except DamagedCheckpointError:  # whoever loads will say so
            damaged = True
    if damaged:
        raise _none_is_whole(checkpoints, steps)
    return None


def _say(error: DamagedCheckpointError, step: int, steps: list[int]) -> None:
    earlier = [other for other in steps if other < step]
    then = f"trying the one of step {earlier[-1]}" if earlier else "there is none before it"
    print(f"warning: {plain_text(str(error))}; {then}", file=sys.stderr)


def _none_is_whole(checkpoints: Checkpoints, steps: list[int]) -> UserError:
    where = checkpoints.where(steps[-1]).rpartition("/")[0]
    return UserError(
        f"'{where}' holds {len(steps)} checkpoint{'s' if len(steps) > 1 else ''} and no whole one: "
        "restore one, or delete them (or give the run another --name) to begin again at step 0"
    )
