"""A checkpoint of ours as a file of the SiT, REPA and HASTE repositories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.checkpoints.integrity import DamagedCheckpointError
from pipeline.checkpoints.reference_format import Parts, join_state, write_file
from pipeline.checkpoints.state import load_optimizer, read_state
from pipeline.models import make_student
from pipeline.models.ema import catch_up
from pipeline.models.projector import Projector
from schemas.errors import UserError


def export_checkpoint(folder: Path, out: Path) -> None:
    """Write weights, averages and AdamW's state of one checkpoint's folder to the file ``out``.

    A run without feature loss has no projector, and the file then has none, as SiT's own files.
    """
    state = read_state(folder)
    with torch.device("meta"):  # for the order of names, which safetensors does not keep
        student, projector = make_student(state.config.student), Projector(1, 1, 1)
    model, ema = (
        Parts(
            _read(folder, weights, student),
            _read(folder, head, projector) if (folder / f"{head}.safetensors").exists() else {},
        )
        for weights, head in (("model", "projector"), ("ema", "projector_ema"))
    )
    theirs = list(join_state(model))
    ema = ema._replace(
        projector=catch_up(
            ema.projector, model.projector, state.config.ema_decay, state.projector_ema_lag
        )
    )
    ours = [name for name, _ in student.named_parameters()]
    ours += [name for name in theirs if name not in model.student]
    optimizer = load_optimizer(folder)
    write_file(
        out,
        model=model,
        ema=ema,
        optimizer=_renumber(optimizer, ours, theirs),
        steps=state.step,
        args=state.config.model_dump(mode="json"),
    )


def _renumber(optimizer: dict[str, Any], ours: Sequence[str], theirs: Sequence[str]) -> Any:
    """One group of all parameters in the authors' order, where ours has the student and, until the
    termination, the projector. Their position table is a frozen parameter: a number, no state."""
    group = {key: value for key, value in optimizer["param_groups"][0].items() if key != "params"}
    state = {theirs.index(ours[number]): value for number, value in optimizer["state"].items()}
    return {
        "state": dict(sorted(state.items())),
        "param_groups": [{**group, "params": list(range(len(theirs)))}],
    }


def _read(folder: Path, name: str, like: nn.Module) -> dict[str, Tensor]:
    """The weights ``NAME.safetensors`` in the order of a module's state."""
    path = folder / f"{name}.safetensors"
    try:
        state = load_file(path)
        return {name: state[name] for name in like.state_dict()}
    except FileNotFoundError:
        raise UserError(f"checkpoint '{folder}' lacks {path.name}") from None
    except (SafetensorError, KeyError) as error:
        raise DamagedCheckpointError(folder, f"{path.name}: {error}") from None
