"""A training run on disk: weights as safetensors, the optimizer, and one JSON of plain state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.storage.secrets import written_down
from pipeline.train.trainer import Trainer
from schemas.errors import UserError
from schemas.options import validate
from schemas.run import RunConfig
from schemas.store import AutoencoderInfo

STATE = "state.json"
VERSION = 1
KEPT = (
    "student",
    "diffusion",
    "alignment",
    "optimizer",
    "data",
    "global_batch",
    "seed",
    "ema_decay",
)
"""Parts of a config that a resumed run must not change; of ``data`` only the window counts."""


@dataclass(frozen=True)
class CheckpointState:
    """What stands in ``state.json``."""

    step: int
    config: RunConfig
    autoencoder: AutoencoderInfo
    store_fingerprint: str
    termination: dict[str, Any] | None
    trigger: dict[str, Any]
    bytes_read: dict[str, dict[str, int]]
    """Per stream: bytes read before and after the termination, over all workers."""
    data: dict[str, Any]
    """What ``BatchLoader.state`` says: shards that are left out."""


def write_checkpoint(
    folder: Path,
    trainer: Trainer,
    *,
    trigger: dict[str, Any],
    bytes_read: dict[str, dict[str, int]],
    data: dict[str, Any],
) -> None:
    """Write everything that a resumed run needs into an empty folder, ``state.json`` last."""
    _save(trainer.module.student.state_dict(), folder / "model.safetensors")
    _save(trainer.ema.module.state_dict(), folder / "ema.safetensors")
    if trainer.projector is not None and trainer.projector_ema is not None:
        _save(trainer.projector.state_dict(), folder / "projector.safetensors")
        lag = 0 if trainer.aligned else trainer.step - trainer.projector_ema_step
        average = trainer.projector_ema.caught_up(trainer.projector, lag)
        _save(average, folder / "projector_ema.safetensors")
    torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
    state = {
        "version": VERSION,
        "step": trainer.step,
        "samples_consumed": trainer.step * trainer.config.global_batch,
        "phase": 1 if trainer.aligned else 2,
        "termination": trainer.termination,
        "trigger": trigger,
        "bytes_read": bytes_read,
        "data": data,
        "store_fingerprint": trainer.manifest.dataset.fingerprint,
        "autoencoder": trainer.manifest.autoencoder.model_dump(),
        "config": written_down(trainer.config.model_dump()),
    }
    (folder / STATE).write_text(json.dumps(state, indent=1))


def read_state(folder: Path) -> CheckpointState:
    """The plain state of a checkpoint. Raises ``UserError``."""
    try:
        state = json.loads((folder / STATE).read_text())
        if state["version"] > VERSION:
            raise UserError(
                f"checkpoint '{folder}' is of version {state['version']}, newer than "
                f"this software knows ({VERSION}); update it"
            )
        return CheckpointState(
            step=int(state["step"]),
            config=validate(RunConfig, state["config"], where=f"{folder}/{STATE}"),
            autoencoder=AutoencoderInfo(**state["autoencoder"]),
            store_fingerprint=state["store_fingerprint"],
            termination=state["termination"],
            trigger=state["trigger"],
            bytes_read=state["bytes_read"],
            data=state.get("data", {}),
        )
    except FileNotFoundError:
        raise UserError(f"'{folder}' is not a checkpoint: it has no {STATE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint '{folder}' is damaged: {STATE}: {error}") from None


def load_checkpoint(folder: Path, trainer: Trainer) -> CheckpointState:
    """Continue from a checkpoint. Raises ``UserError`` where it belongs to another model or
    store."""
    state = read_state(folder)
    check_same_run(state, trainer.config, folder)
    if state.store_fingerprint != trainer.manifest.dataset.fingerprint:
        raise UserError(
            f"checkpoint '{folder}' was trained on another data set than the store "
            "holds; give the run another --name"
        )
    load_weights(folder, "model", trainer.module.student)
    load_weights(folder, "ema", trainer.ema.module)
    if trainer.projector is not None and trainer.projector_ema is not None:
        load_weights(folder, "projector", trainer.projector)
        load_weights(folder, "projector_ema", trainer.projector_ema.module)
    trainer.step = state.step
    if state.termination is not None:
        trainer.terminate(state.termination)
    optimizer = torch.load(
        folder / "optimizer.pt", map_location=trainer.parallel.device, weights_only=True
    )
    trainer.optimizer.load_state_dict(optimizer)
    return state


def check_same_run(state: CheckpointState, config: RunConfig, folder: Path) -> None:
    """Raises ``UserError`` where ``config`` would not continue what the checkpoint began."""
    for key in KEPT:
        old, new = getattr(state.config, key), getattr(config, key)
        if old != new:
            names = type(old).model_fields if hasattr(old, "model_fields") else {}
            changed = [f"{key}.{n}" for n in names if getattr(old, n) != getattr(new, n)] or [key]
            if key == "data" and "data.window" not in changed:
                continue
            changed = ["data.window"] if key == "data" else changed
            raise UserError(
                f"checkpoint '{folder}' is of another model or run: it has "
                f"{_value(state.config, changed[0])} for {changed[0]}, the config says "
                f"{_value(config, changed[0])}; give the run another --name"
            )


def load_weights(folder: Path, name: str, module: torch.nn.Module) -> None:
    """Fill ``module`` from ``NAME.safetensors``. Raises ``UserError`` where it does not fit."""
    path = folder / f"{name}.safetensors"
    try:
        module.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise UserError(f"checkpoint '{folder}' lacks {path.name}") from None
    except SafetensorError as error:
        raise UserError(f"checkpoint '{folder}' is damaged: {path.name}: {error}") from None
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(
            f"'{path}' is of another model: {lines[min(1, len(lines) - 1)].strip()[:200]}"
        ) from None


def _save(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def _value(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = getattr(config, part)
    return config
