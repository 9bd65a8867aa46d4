"""Selection of the checkpoint to resume from: the latest valid one."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.checkpoints.integrity import (
    DamagedCheckpointError,
    UnfinishedCheckpointError,
    parse_state_json,
    verify,
)
from schemas.errors import UserError, plain_text

if TYPE_CHECKING:
    from pipeline.checkpoints.state import CheckpointContents, CheckpointState

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"


class Checkpoints(Protocol):
    """The checkpoints of one run, on a local disk or an object store. One process saves, or each
    that has a share."""

    def save(self, step: int, contents: CheckpointContents) -> None:
        """Write the checkpoint of a step, all of it or nothing, and prune older ones. With a share
        other than the first, write that: the process of the first publishes."""

    def steps(self) -> list[int]:
        """Steps of all checkpoints, valid or not; oldest first."""

    def where(self, step: int) -> str:
        """Path or URL of a checkpoint, for messages."""

    def state(self, step: int) -> bytes:
        """Bytes of ``state.json``. Raises ``DamagedCheckpointError`` where it is missing."""

    def fetch(self, step: int, scratch: Path) -> Path:
        """A local folder with all files of a checkpoint: its own, or a copy below ``scratch``."""


def is_weights_file(checkpoint: Path) -> bool:
    """True for a .pt file, False for the folder of a checkpoint or a run."""
    return checkpoint.is_file() or checkpoint.suffix in (".pt", ".pth")


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step:09d}"


def steps_of(names: Iterable[str]) -> list[int]:
    """Steps of the folders among ``names`` that are checkpoints, oldest first."""
    found = (re.fullmatch(rf"{PREFIX}(\d+)", name) for name in names)
    return sorted(int(match[1]) for match in found if match is not None)


def to_prune(steps: Iterable[int], newest: int, keep: int) -> list[int]:
    """Steps to remove once ``newest`` is written: all but the last ``keep`` up to it, and all later
    ones, because the run resumed from before them."""
    steps = sorted(steps)
    earlier = [step for step in steps if step <= newest]
    return earlier[:-keep] + [step for step in steps if step > newest]


def latest_valid(
    checkpoints: Checkpoints, scratch: Path, check: Callable[[Path], object] = verify
) -> tuple[int, Path] | None:
    """Step and local folder of the latest checkpoint that passes ``check``, by default one all of
    whose checksums are right; None where the run has none yet (an interrupted upload is not a
    checkpoint).

    Damaged ones are logged and skipped. Raises ``UserError`` where all are damaged.
    """
    steps = checkpoints.steps()
    damaged = False
    for step in reversed(steps):
        try:
            folder = checkpoints.fetch(step, scratch)
            check(folder)
        except DamagedCheckpointError as error:
            _log_damage(error, step, steps)
            damaged = damaged or not isinstance(error, UnfinishedCheckpointError)
        else:
            return step, folder
    if damaged:
        raise _none_is_valid(checkpoints, steps)
    return None


def search_latest_valid(
    checkpoints: Checkpoints, scratch: Path, check: Callable[[Path], object] = verify
) -> Future[tuple[int, Path] | None]:
    """``latest_valid`` in a thread, because reading takes as long as building a model does."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="verify")
    search = pool.submit(latest_valid, checkpoints, scratch, check)
    pool.shutdown(wait=False)
    return search


def latest_state(checkpoints: Checkpoints) -> CheckpointState | None:
    """State of the latest checkpoint whose ``state.json`` is valid; no other file is read.

    Raises as ``latest_valid``.
    """
    from pipeline.checkpoints.state import parse_state  # loads torch, which names need not

    steps = checkpoints.steps()
    damaged = False
    for step in reversed(steps):
        where = checkpoints.where(step)
        try:
            return parse_state(parse_state_json(checkpoints.state(step), where), where)
        except UnfinishedCheckpointError:
            continue
        except DamagedCheckpointError:  # logged by ``latest_valid``
            damaged = True
    if damaged:
        raise _none_is_valid(checkpoints, steps)
    return None


def _log_damage(error: DamagedCheckpointError, step: int, steps: list[int]) -> None:
    earlier = [other for other in steps if other < step]
    then = f"trying step {earlier[-1]}" if earlier else "there is no earlier one"
    logger.warning("%s; %s", plain_text(str(error)), then)


def _none_is_valid(checkpoints: Checkpoints, steps: list[int]) -> UserError:
    where = checkpoints.where(steps[-1]).rpartition("/")[0]
    return UserError(
        f"'{where}' holds {len(steps)} checkpoint{'s' if len(steps) > 1 else ''} and no valid one: "
        "restore one, or delete them (or give the run another --name) to begin again at step 0"
    )
