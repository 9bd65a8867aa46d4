"""The plain state of a checkpoint (``state.json``) and its files of weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.checkpoints.integrity import STATE, DamagedCheckpointError, verify
from pipeline.checkpoints.store_identity import STREAM
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.store import AutoencoderInfo
from schemas.validation import validate

VERSION = 2


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
    store: dict[str, Any]
    """What ``store_identity`` said of the store."""
    termination: dict[str, Any] | None
    trigger: dict[str, Any]
    bytes_read: dict[str, dict[str, int]]
    """Per stream: bytes read before and after the termination, over all workers."""
    meter: dict[str, Any]
    """What was measured since the last row of the metrics."""
    metrics_rows: int
    """Rows of the metrics file that were written before the checkpoint."""
    looked: bool
    """Whether what is looked at after this step had been when the checkpoint was written."""
    data: dict[str, Any]
    """What ``BatchLoader.state`` says: shards that are left out."""

    @property
    def projector_ema_lag(self) -> int:
        """Steps that ``projector_ema.safetensors`` is behind: since the termination it is brought
        up to date only where it is read."""
        terminated = self.termination
        return 0 if terminated is None else self.step - int(terminated["terminated_at_step"])


def read_state(folder: Path) -> CheckpointState:
    """The plain state of a checkpoint whose files all have their sizes. Raises ``UserError``."""
    return parse_state(verify(folder, hashes=False), folder)


def parse_state(state: dict[str, Any], where: str | Path) -> CheckpointState:
    """What ``verify`` found at ``where``, understood. Raises ``UserError``."""
    try:
        if state["version"] > VERSION:
            raise UserError(
                f"checkpoint '{where}' is of version {state['version']}, newer than "
                f"this software knows ({VERSION}); update it"
            )
        return CheckpointState(
            step=int(state["step"]),
            config=validate(RunConfig, state["config"], where=f"{where}/{STATE}"),
            autoencoder=AutoencoderInfo(**state["autoencoder"]),
            store=state["store"],
            termination=state["termination"],
            trigger=state["trigger"],
            bytes_read=state["bytes_read"],
            meter=state["meter"],
            metrics_rows=int(state["metrics_rows"]),
            looked=bool(state.get("looked", True)),  # earlier versions looked before they saved
            data=state.get("data", {}),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(where, f"{STATE}: {error}") from None


def load_optimizer(folder: Path) -> dict[str, Any]:
    """AdamW's state, on the CPU: the optimizer moves what belongs elsewhere, and its plain form
    reads its step counts at every step, which must not lie on a GPU. Raises ``UserError``."""
    path = folder / "optimizer.pt"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint '{folder}' lacks {path.name}") from None
    except Exception as error:  # torch and pickle raise whatever the bytes made them stumble on
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpointError(folder, f"{path.name}: {reason}") from None
    return state


def check_same_run(state: CheckpointState, config: RunConfig, folder: str | Path) -> None:
    """Raises ``UserError`` where ``config`` would not continue what the checkpoint began."""
    for key in KEPT:
        old, new = getattr(state.config, key), getattr(config, key)
        if key == "alignment" and None in (old.stream, new.stream):  # the one that it followed
            stream = state.store.get(STREAM)
            old, new = (a.model_copy(update={"stream": a.stream or stream}) for a in (old, new))
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
        raise DamagedCheckpointError(folder, f"{path.name}: {error}") from None
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(
            f"'{path}' is of another model: {lines[min(1, len(lines) - 1)].strip()[:200]}"
        ) from None


def _value(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = getattr(config, part)
    return config
