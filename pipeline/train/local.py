"""Training in one plain process, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.checkpoints.selection import checkpoint_name, latest_state, search_latest_valid
from pipeline.checkpoints.state import CheckpointContents, verify_finite
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import StopSignals
from pipeline.runs.compatibility import resolve_run
from pipeline.store import Store
from pipeline.train.loop import run_training
from schemas.errors import StoppedError
from schemas.run import RunConfig


def train_here(
    config: RunConfig,
    folder: Path,
    group: ProcessGroup | None = None,
    *,
    on_checkpoint: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Train in this process, continuing from the latest valid checkpoint in ``folder``.

    SIGTERM and Ctrl-C end it with a checkpoint and a ``StoppedError``. ``group`` names the device;
    the default is the CPU. ``on_checkpoint`` is called with the folder of every checkpoint once it
    is written, and with that of the one from which the run continues. The training waits for it,
    because it may sample, which sets the arithmetic of the whole process. Returns the summary.
    """
    if on_checkpoint is not None:
        waits = config.checkpoint.model_copy(update={"background": False})
        config = config.model_copy(update={"checkpoint": waits})
    assert config.store is not None
    checkpoints = LocalCheckpoints(folder, config.checkpoint.keep)

    def save(step: int, contents: CheckpointContents) -> None:
        checkpoints.save(step, contents)
        if on_checkpoint is not None:
            on_checkpoint(folder / checkpoint_name(step))

    with StopSignals() as signals:
        try:
            state = latest_state(checkpoints)
            where = None if state is None else checkpoints.where(state.step)
            config = resolve_run(config, Store.open(config.store).manifest, state, where)
            search = search_latest_valid(checkpoints, folder, verify_finite)
            latest = _result(search, on_checkpoint)
            resumes = state is not None  # or ``latest`` raises
            return run_training(
                config, folder, save, latest, group=group, poll=signals, resumes=resumes
            )
        except StoppedError as stop:
            raise StoppedError(str(stop), signals.exit_code) from None


@contextmanager
def _result(
    search: Future[tuple[int, Path] | None], on_checkpoint: Callable[[Path], None] | None
) -> Iterator[Path | None]:
    found = search.result()
    if found is not None and on_checkpoint is not None:
        on_checkpoint(found[1])
    yield None if found is None else found[1]
