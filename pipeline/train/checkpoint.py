"""A training run on disk: weights as safetensors, the optimizer, and one JSON of plain state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoints.integrity import verify, write_state
from pipeline.checkpoints.state import (
    VERSION,
    CheckpointState,
    check_same_run,
    load_optimizer,
    load_weights,
    parse_state,
)
from pipeline.checkpoints.store_identity import check_store_identity
from pipeline.storage.redaction import redacted_config
from pipeline.train.trainer import Trainer


def write_checkpoint(
    folder: Path,
    trainer: Trainer,
    *,
    store: dict[str, Any],
    trigger: dict[str, Any],
    bytes_read: dict[str, dict[str, int]],
    meter: dict[str, Any],
    metrics_rows: int,
    looked: bool,
    data: dict[str, Any],
) -> None:
    """Write everything that a resumed run needs into an empty folder, ``state.json`` last.

    The projector's average is written as of the termination: closing the gap twice would round
    twice, and a resumed run would not be the same.
    """
    _save(trainer.module.student.state_dict(), folder / "model.safetensors")
    _save(trainer.ema.module.state_dict(), folder / "ema.safetensors")
    if trainer.projector is not None and trainer.projector_ema is not None:
        _save(trainer.projector.state_dict(), folder / "projector.safetensors")
        _save(trainer.projector_ema.module.state_dict(), folder / "projector_ema.safetensors")
    torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
    state = {
        "version": VERSION,
        "step": trainer.step,
        "samples_consumed": trainer.step * trainer.config.global_batch,
        "phase": 1 if trainer.aligned else 2,
        "termination": trainer.termination,
        "trigger": trigger,
        "bytes_read": bytes_read,
        "meter": meter,
        "metrics_rows": metrics_rows,
        "looked": looked,
        "store": store,
        "data": data,
        "autoencoder": trainer.manifest.autoencoder.model_dump(),
        "config": redacted_config(trainer.config.model_dump(mode="json")),
    }
    write_state(folder, state)


def load_checkpoint(folder: Path, trainer: Trainer, store: dict[str, Any]) -> CheckpointState:
    """Continue from a checkpoint, after its files have been checked.

    ``store`` is what ``store_identity`` says now. Raises ``UserError`` where the checkpoint is
    damaged or belongs to another model or store.
    """
    state = parse_state(verify(folder), folder)
    check_same_run(state, trainer.config, folder)
    check_store_identity(state.store, store, aligned=state.termination is None, where=folder)
    load_weights(folder, "model", trainer.module.student)
    load_weights(folder, "ema", trainer.ema.module)
    if trainer.projector is not None and trainer.projector_ema is not None:
        load_weights(folder, "projector", trainer.projector)
        load_weights(folder, "projector_ema", trainer.projector_ema.module)
    trainer.step = state.step
    if state.termination is not None:
        trainer.terminate(state.termination)
    trainer.optimizer.load_state_dict(load_optimizer(folder))
    return state


def _save(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
