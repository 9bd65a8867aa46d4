"""Checkpoints in the file format of the SiT, REPA and HASTE repositories.

A ``.pt`` or ``.pth`` file with ``model``, ``ema``, ``opt``, and ``steps`` or ``args``, or one bare
state dict. A state dict holds the student under the names of this project's students, and the
projector as ``projectors.0.{0,2,4}``; all names may have the prefix ``module.`` (DDP).
"""

from __future__ import annotations

import argparse
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.models.factory import make_student
from pipeline.models.sit import SiT
from schemas.classes import ClassTable
from schemas.errors import UserError, plain_text
from schemas.student import SIZES, StudentConfig
from schemas.validation import validate

PROJECTOR = "projectors.0."
WRAPPERS = ("module.", "_orig_mod.")  # DDP, torch.compile
SETS = ("model", "ema")
CLASSES = "classes"
"""Key of the classes of a run, in ``args`` and in ``state.json``."""


class Parts(NamedTuple):
    """A state dict, split into student and projector."""

    student: dict[str, Tensor]
    projector: dict[str, Tensor]
    """Empty if the file has none (SiT's own checkpoints)."""


def read_file(path: Path, weights: str = "ema") -> Parts:
    """Read ``weights`` ('model' or 'ema') of a checkpoint file, or a bare state dict.

    No pickled code is run. Raises ``UserError``.
    """
    content = _load(path)
    state = content
    if isinstance(content, dict) and any(name in content for name in SETS):
        if weights not in content:
            raise UserError(
                f"checkpoint '{path}' has no '{weights}' weights, only {_keys(content)}"
            )
        state = content[weights]
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(
            f"checkpoint '{path}' is neither a state dict nor a mapping with 'model' and 'ema' "
            f"(found {_keys(content)})"
        )
    return split_state(state)


def read_classes(path: Path, count: int) -> ClassTable:
    """The classes that ``jobs/export.py`` noted in a file; without a note ``count`` classes without
    names. Raises ``UserError``."""
    content = _load(path)
    args = content.get("args") if isinstance(content, dict) else None
    noted = args.get(CLASSES) if isinstance(args, dict) else None
    if not isinstance(noted, dict) or "count" not in noted:  # not a note of this project
        return ClassTable(count=count)
    where = f"checkpoint '{path}', args.{CLASSES}"
    classes = validate(ClassTable, noted, where=where)
    if classes.count > count:
        raise UserError(f"{where}: {classes.count} classes, its student has {count}")
    return classes


def _load(path: Path) -> Any:
    """Content of a checkpoint file. No pickled code is run. Raises ``UserError``."""
    try:
        # HASTE and REPA store the command line under 'args'
        with torch.serialization.safe_globals([argparse.Namespace]):
            # memory-mapped, because two thirds of such a file are optimizer state
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # a damaged file makes torch raise any kind
        reason = "no such file" if not path.exists() else plain_text(str(error))[:200]
        raise UserError(f"checkpoint '{path}': cannot read it ({reason})") from None
    return content


def split_state(state: Mapping[str, Tensor]) -> Parts:
    """Split into student and projector, under this project's names."""
    student: dict[str, Tensor] = {}
    projector: dict[str, Tensor] = {}
    for name, tensor in state.items():
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        if name.startswith(PROJECTOR):
            projector[name.removeprefix(PROJECTOR)] = tensor
        else:
            student[name] = tensor
    return Parts(student, projector)


def join_state(parts: Parts) -> dict[str, Tensor]:
    """The inverse of ``split_state``, in the order of SiT in the authors' code, where the
    projector precedes the final layer."""
    projector = {PROJECTOR + name: tensor for name, tensor in parts.projector.items()}
    last = {name: t for name, t in parts.student.items() if name.startswith("final_layer.")}
    first = {name: t for name, t in parts.student.items() if name not in last}
    return first | projector | last


def student_from_file(path: Path, model: str, weights: str = "ema") -> SiT:
    """Load a student from a checkpoint file. ``model`` is its published name, such as SiT-XL/2,
    because the file does not record the number of heads. Raises ``UserError``."""
    state = read_file(path, weights).student
    try:
        config = student_config(state, model)
    except KeyError as error:
        raise UserError(f"checkpoint '{path}' is not a {model}: it lacks {error}") from None
    except (ValueError, IndexError) as error:
        reason = plain_text(str(error))[:200]
        raise UserError(f"checkpoint '{path}' is not a {model}: {reason}") from None
    student = make_student(config)
    try:
        student.load_state_dict(drop_learned_sigma(state, config))
    except RuntimeError as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines()]
        reason = lines[min(1, len(lines) - 1)][:200]
        raise UserError(f"checkpoint '{path}' is not a {model}: {reason}") from None
    return student


def student_config(state: Mapping[str, Tensor], model: str) -> StudentConfig:
    """The config of a ``model`` with the shapes in ``state``. Raises ``ValueError`` for a state of
    another model, ``KeyError`` if it is not a diffusion transformer."""
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
    tokens = state["pos_embed"].shape[1]
    family, size, named_patch = re.split("[-/]", model)
    if (depth, width) != SIZES[size][:2] or patch != int(named_patch):
        fitting = [name for name, sizes in SIZES.items() if sizes[:2] == (depth, width)]
        raise ValueError(
            f"it has {depth} blocks of width {width} and patch {patch}"
            + (f", which is {family}-{fitting[0]}/{patch}" if fitting else "")
        )
    return StudentConfig(
        model=model,
        latent_size=math.isqrt(tokens) * patch,
        latent_channels=channels,
        num_classes=classes,
    )


def drop_learned_sigma(state: Mapping[str, Tensor], config: StudentConfig) -> dict[str, Tensor]:
    """Keep the velocity half of a SiT's final layer that has twice the channels.

    SiT's own repository builds its models with ``learn_sigma``: 2 C output channels, of which its
    forward pass returns the first C, the velocity. A patch's outputs are ordered row, column,
    channel. REPA and HASTE have no second half; a DiT needs it.
    """
    state = dict(state)
    if config.family == "SiT":
        cells, channels = config.size.patch_size**2, config.latent_channels
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            if name in state and len(state[name]) == 2 * cells * channels:
                outputs = state[name].unflatten(0, (cells, 2 * channels))
                state[name] = outputs[:, :channels].flatten(0, 1)
    return state


def write_file(
    path: Path,
    *,
    model: Parts,
    ema: Parts,
    optimizer: Mapping[str, Any],
    steps: int,
    args: Mapping[str, Any],
) -> None:
    """Write a file that the authors' repositories read: plain data and tensors, no pickled classes.

    ``optimizer`` numbers the parameters in the order of ``join_state(model)``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "model": join_state(model),
        "ema": join_state(ema),
        "opt": dict(optimizer),
        "args": dict(args),
        "steps": steps,
    }
    temporary = path.with_name(f"{path.name}.tmp")
    torch.save(content, temporary)
    temporary.replace(path)


def _keys(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = [repr(key) for key in content]
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
