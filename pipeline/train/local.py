"""Training in one plain process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.state import verify_finite
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import StopSignals
from pipeline.train.loop import train
from schemas.errors import StoppedError
from schemas.run import RunConfig


def train_here(
    config: RunConfig, folder: Path, group: ProcessGroup | None = None
) -> dict[str, Any]:
    """Train in this process, continuing from the latest valid checkpoint in ``folder``.

    SIGTERM and Ctrl-C end it with a checkpoint and a ``StoppedError``. ``group`` names the device;
    the default is the CPU. Returns the summary.
    """
    checkpoints = LocalCheckpoints(folder, config.checkpoint.keep)
    with StopSignals() as signals:
        try:
            resume = latest_checkpoint(folder, verify_finite)
            return train(config, folder, checkpoints.save, group=group, resume=resume, poll=signals)
        except StoppedError as stop:
            raise StoppedError(str(stop), signals.exit_code) from None
