"""Checkpoints in a folder of this machine, and a run that trains here in one plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.state import read_state
from pipeline.checkpoints.store_identity import with_stream
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import StopSignals
from pipeline.store import Store
from pipeline.train.loop import train
from schemas.errors import StoppedError
from schemas.run import RunConfig


def train_here(
    config: RunConfig, folder: Path, parallel: ProcessGroup | None = None
) -> dict[str, Any]:
    """Train in this process, from the newest whole checkpoint in ``folder`` on. SIGTERM and Ctrl-C
    end it with a checkpoint and a ``StoppedError``. Returns the summary. ``parallel`` names the
    device; default the CPU."""
    checkpoints = LocalCheckpoints(folder, config.checkpoint.keep)
    with StopSignals() as signals:
        try:
            resume = latest_checkpoint(folder)
            if resume is not None:
                manifest = Store.open(str(config.store)).manifest
                config = with_stream(config, manifest, read_state(resume).store)
            return train(
                config, folder, checkpoints.save, parallel=parallel, resume=resume, ask=signals
            )
        except StoppedError as stop:
            raise StoppedError(str(stop), signals.exit_code) from None
