"""Training in one plain process, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.selection import checkpoint_name
from pipeline.checkpoints.state import CheckpointContents, verify_finite
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import StopSignals
from pipeline.train.loop import train
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
    is written, and with that of the one from which the run continues. Returns the summary.
    """
    checkpoints = LocalCheckpoints(folder, config.checkpoint.keep)

    def save(step: int, contents: CheckpointContents) -> None:
        checkpoints.save(step, contents)
        if on_checkpoint is not None:
            on_checkpoint(folder / checkpoint_name(step))

    with StopSignals() as signals:
        try:
            resume = latest_checkpoint(folder, verify_finite)
            if resume is not None and on_checkpoint is not None:
                on_checkpoint(resume)
            return train(config, folder, save, group=group, resume=resume, poll=signals)
        except StoppedError as stop:
            raise StoppedError(str(stop), signals.exit_code) from None
