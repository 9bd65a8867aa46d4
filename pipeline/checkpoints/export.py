"""Export of a checkpoint to the file format of the SiT, REPA and HASTE repositories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoints.integrity import DamagedCheckpointError
from pipeline.checkpoints.reference_format import NULL_CONTEXT, Parts, join_state, write_file
from pipeline.checkpoints.state import (
    TEXT_ENCODER,
    classes_to_save,
    load_optimizer,
    projector_files,
    read_state,
    read_weights,
    weights_file,
)
from pipeline.models import make_student
from pipeline.models.ema import catch_up
from pipeline.models.projector import make_projector
from pipeline.precision import check_finite


def export_checkpoint(folder: Path, out: Path) -> None:
    """Write weights, averages and AdamW's state of a checkpoint's folder to the file ``out``.

    Projectors are numbered from 0 on in the order of the streams. A run without feature loss has no
    projector; its file has none either, like SiT's own files. Raises ``UserError`` where a weight
    is not finite.
    """
    state = read_state(folder)
    with torch.device("meta"):  # only for the order of names, which safetensors loses
        student = make_student(state.config.student)
    projectors, averages = [], []
    for number, options in enumerate(state.config.alignment.streams):
        if options.feature_weight:
            with torch.device("meta"):
                projector = make_projector(options, 1, 1, (1, 1))
            own, average = (_read(folder, name, projector) for name in projector_files(number))
            lag = state.projector_ema_lag
            averages.append(catch_up(average, own, state.config.ema_decay, lag))
            projectors.append(own)
    model, ema = (
        Parts(_read(folder, name, student), *_first_and_others(heads))
        for name, heads in (("model", projectors), ("ema", averages))
    )
    null, _ = (parts.student.pop(NULL_CONTEXT, None) for parts in (model, ema))
    reference_names = list(join_state(model))
    if null is not None:  # the position table of the authors' MMDiT is a buffer, without a number
        reference_names.remove("pos_embed")
    for weights, parts in (("model", model), ("ema", ema)):
        check_finite(join_state(parts), f"checkpoint '{folder}', {weights}")
    names = [name for name, _ in student.named_parameters()]
    names += [name for name in reference_names if name not in model.student]
    optimizer, text = load_optimizer(folder), state.text_encoder
    write_file(
        out,
        model=model,
        ema=ema,
        optimizer=_renumber(optimizer, names, reference_names),
        steps=state.step,
        args={
            **state.config.model_dump(mode="json"),
            "autoencoder": state.autoencoder.model_dump(mode="json"),
            **classes_to_save(state.classes, state.config),
            **({} if text is None else {TEXT_ENCODER: text.model_dump(mode="json")}),
        },
        null_context=null,
    )


def _first_and_others(
    projectors: Sequence[dict[str, Tensor]],
) -> tuple[dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
    return (projectors[0] if projectors else {}), tuple(projectors[1:])


def _renumber(
    optimizer: dict[str, Any], names: Sequence[str], reference_names: Sequence[str]
) -> Any:
    """AdamW's state with one group of all parameters in the authors' order. Ours has one group for
    the student and, until the termination, one for the projectors. The position table of the
    authors' SiT is a frozen parameter: it has a number but no state."""
    group = {key: value for key, value in optimizer["param_groups"][0].items() if key != "params"}
    state = {
        reference_names.index(names[number]): value for number, value in optimizer["state"].items()
    }
    return {
        "state": dict(sorted(state.items())),
        "param_groups": [{**group, "params": list(range(len(reference_names)))}],
    }


def _read(folder: Path, name: str, like: nn.Module) -> dict[str, Tensor]:
    """Weights of ``NAME.safetensors`` in the order of a module's state."""
    state = read_weights(folder, name)
    try:
        return {name: state[name] for name in like.state_dict()}
    except KeyError as error:
        raise DamagedCheckpointError(folder, f"{weights_file(name)}: {error}") from None
