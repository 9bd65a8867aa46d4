"""Checkpoints in the file format of the SiT, DiT, REPA, HASTE and REG repositories.

A ``.pt`` or ``.pth`` file with ``model``, ``ema``, ``opt``, and ``steps`` or ``args``, or one bare
state dict. A state dict holds the student under the names of this project's students, and the
projectors as ``projectors.N.{0,2,4}``, in iREPA's files as ``projectors.N.projection_layer.`` with
``{0,2,4}`` or a convolution's ``weight`` and ``bias``; all names may have the prefix ``module.``
(DDP).
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoints.conventions import (
    ExportedRun,
    args_of,
    count_classes,
    exported_run,
    find_convention,
    unknown_part,
)
from pipeline.models.factory import Student, make_student
from pipeline.precision import check_finite
from pipeline.text import unpickling_fault
from schemas.classes import ClassTable
from schemas.diffusion import Convention
from schemas.errors import UserError, plain_text
from schemas.sample import FileOptions
from schemas.student import SIZES, StudentConfig
from schemas.validation import validate

PROJECTORS = "projectors."
IREPA = "projection_layer."
"""Before the names of a projector's weights in iREPA's files, of a convolution and of an MLP."""
WRAPPERS = ("module.", "_orig_mod.")  # DDP, torch.compile
CLASS_TOKEN = ("cls_projectors2.", "wg_norm.", "final_layer.linear_cls.")
"""First letters of the weights of REG's class token."""
SETS = ("model", "ema")
CLASSES = "classes"
"""Key of the classes of a run, in ``args`` and in ``state.json``."""
NULL_CONTEXT = "null_context"
"""Key of the null caption of an MMDiT, in files and among the weights of a student."""


class Parts(NamedTuple):
    """A state dict, split into student and projectors."""

    student: dict[str, Tensor]
    projector: dict[str, Tensor]
    """The first; empty if the file has none (SiT's own checkpoints)."""
    others: tuple[dict[str, Tensor], ...] = ()
    """Further projectors, of REPA's runs with several encoders, in their order."""


def read_file(path: Path, weights: str = "ema") -> Parts:
    """Read ``weights`` ('model' or 'ema') of a checkpoint file, or a bare state dict.

    No pickled code is run. Raises ``UserError``.
    """
    return _choose_weights(_load(path), path, weights)


def read_export(path: Path) -> ExportedRun | None:
    """Facts in a file of ``export_checkpoint``; None for any other. Raises ``UserError``."""
    return _exported_run(_load(path), path)


def _exported_run(content: Any, path: Path) -> ExportedRun | None:
    try:
        return exported_run(args_of(content))
    except ValueError as error:
        raise UserError(
            f"checkpoint '{path}': its args are of another version of this software "
            f"({plain_text(str(error))[:200]})"
        ) from None


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":  # weights alone
            return load_file(path)
        # HASTE and REPA store the command line under 'args'
        with torch.serialization.safe_globals([argparse.Namespace]):
            # memory-mapped, because two thirds of such a file are optimizer state
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint '{path}': cannot read it ({unpickling_fault(error)}); ask its authors for "
            "a file of weights alone"
        ) from None
    except Exception as error:  # a damaged file makes torch raise any kind
        reason = "no such file" if not path.exists() else plain_text(str(error))[:200]
        raise UserError(f"checkpoint '{path}': cannot read it ({reason})") from None


def _choose_weights(content: Any, path: Path, weights: str) -> Parts:
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
    try:
        return split_state(state)
    except ValueError as error:
        raise UserError(f"checkpoint '{path}': {error}") from None


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


def split_state(state: Mapping[str, Tensor]) -> Parts:
    """Split into student and projectors, under this project's names. Raises ``ValueError`` where
    two weights differ by a prefix only."""
    student: dict[str, Tensor] = {}
    projectors: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        match = re.fullmatch(rf"{re.escape(PROJECTORS)}(\d+)\.(.+)", name, re.ASCII)
        part, key = (
            (projectors.setdefault(int(match[1]), {}), match[2]) if match else (student, name)
        )
        key = key.removeprefix(IREPA) if match else key
        if key in part:
            raise ValueError(f"two of its weights have the name {name}")
        part[key] = tensor
    first, *others = [projectors[number] for number in sorted(projectors)] or [{}]
    return Parts(student, first, tuple(others))


def join_state(parts: Parts) -> dict[str, Tensor]:
    """The inverse of ``split_state``, in the order of the authors' code: in SiT the projectors
    precede the final layer and the entry of the class token, in MMDiT they are last."""
    projectors = {
        # iREPA's names for its convolution, REPA's and HASTE's for an MLP
        f"{PROJECTORS}{number}.{IREPA if 'weight' in projector else ''}{name}": tensor
        for number, projector in enumerate((parts.projector, *parts.others))
        for name, tensor in projector.items()
    }
    behind: tuple[str, ...] = ("final_layer.", *CLASS_TOKEN)
    if any(name.startswith("joint_blocks.") for name in parts.student):
        behind = ()
    last = {name: t for name, t in parts.student.items() if name.startswith(behind)}
    first = {name: t for name, t in parts.student.items() if name not in last}
    return first | projectors | last


def student_from_file(
    path: Path, model: str | None, weights: str = "ema", options: FileOptions | None = None
) -> Student:
    """Load a student from a checkpoint file, with its convention.

    ``model`` is its published name, such as SiT-XL/2, because the files of other repositories do
    not record the number of heads; None is for a file of ``export_checkpoint``. ``options`` are
    facts that the file does not say. Raises ``UserError`` naming what cannot be drawn.
    """
    content, options = _load(path), options or FileOptions()
    parts = _choose_weights(content, path, weights)
    args = args_of(content)
    run = _exported_run(content, path)
    reads_text = (run.student.model if run else model or "").startswith("MMDiT-")
    if not reads_text and (part := unknown_part(parts.student)) is not None:
        raise UserError(f"checkpoint '{path}' cannot be drawn: its student has {part}")
    shown = model or ("file of a student" if run is None else run.student.model)
    try:
        state = parts.student
        if run is None:
            student, state = _foreign_student(state, model, args, options)
        else:
            student = _student_of_run(run, model, options)
            if reads_text:
                state = {**state, NULL_CONTEXT: content[NULL_CONTEXT]}
        student.load_state_dict(state)
    except KeyError as error:
        raise UserError(f"checkpoint '{path}' is not a {shown}: it lacks {error}") from None
    except (ValueError, IndexError) as error:
        reason = plain_text(str(error))[:400]
        raise UserError(f"checkpoint '{path}' is not a {shown}: {reason}") from None
    except RuntimeError as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines()]
        reason = lines[min(1, len(lines) - 1)][:200]
        raise UserError(f"checkpoint '{path}' is not a {shown}: {reason}") from None
    if run is None:
        _set_convention(student, path, args, join_state(parts), options)
    check_finite(student.state_dict(), f"checkpoint '{path}'")
    return student


def _student_of_run(run: ExportedRun, model: str | None, options: FileOptions) -> Student:
    """A student for the weights of an exported run. Raises ``ValueError`` for options that its file
    does not need."""
    given = options.model_dump(exclude_none=True)
    if model not in (None, run.student.model):
        raise ValueError(f"its args say {run.student.model}")
    if given:
        option = next(iter(given)).replace("_", "-")
        raise ValueError(f"--{option} is for files that do not say it; this one does: leave it out")
    student = make_student(run.student, convention=Convention(path=run.diffusion.path))
    if run.diffusion.label_drop == 0:
        student.null_label = None
    return student


def _foreign_student(
    state: Mapping[str, Tensor], model: str | None, args: Mapping[str, Any], options: FileOptions
) -> tuple[Student, dict[str, Tensor]]:
    """A student for the weights of another repository, without a convention, and the weights that
    it loads. Raises ``ValueError``, and ``KeyError`` for the name of a missing weight."""
    if model is None:
        raise ValueError("it does not record its architecture: add --model")
    if model.startswith("MMDiT-"):
        return _foreign_mmdit(state, model, options)
    _check_named_model(args.get("model"), model)
    own = _without_legacy_names(state)
    config, null_row = student_config(own, model, args, options)
    parts = _outputs(own, config)
    if config.family == "DiT" and parts == 1:
        raise ValueError("it has no outputs for the variance")
    student = make_student(config, null_row=null_row, qk_norm=_has_qk_norm(own, config, args))
    return student, drop_learned_sigma(own, config)


def _foreign_mmdit(
    state: Mapping[str, Tensor], model: str, options: FileOptions
) -> tuple[Student, dict[str, Tensor]]:
    """The same for an MM-DiT of REPA's or HASTE's repository; the null caption, which is in a file
    of its own there, is zeros until ``complete_student`` of ``pipeline.sampling.prompts``."""
    if options.num_classes is not None:
        raise ValueError("--num-classes is for students of classes")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("joint_blocks.")})
    size = StudentConfig(model=model).size
    if (depth, width, patch) != (size.depth, size.width, size.patch_size):
        raise ValueError(
            f"it has {depth} blocks of width {width} and patch {patch}; {model} has {size.depth} "
            f"of width {size.width} and patch {size.patch_size}"
        )
    config = StudentConfig(
        model=model,
        latent_size=math.isqrt(state["pos_embed"].shape[1]) * patch,
        latent_channels=channels,
        text_width=state["context_embedder.weight"].shape[1],
    )
    if _outputs(state, config) != 1:
        raise ValueError("it has outputs for a variance")
    return make_student(config), {**state, NULL_CONTEXT: torch.zeros(config.text_shape)}


def _outputs(state: Mapping[str, Tensor], config: StudentConfig) -> int:
    """Predicted tensors of the latent's shape: 2 with SiT's ``learn_sigma`` and DiT's variance.
    Raises ``ValueError``."""
    outputs = len(state["final_layer.linear.weight"])
    parts, rest = divmod(outputs, config.size.patch_size**2 * config.latent_channels)
    if rest or parts not in (1, 2):
        raise ValueError(
            f"its final layer has {outputs} outputs, for {config.latent_channels} channels and "
            f"patch {config.size.patch_size}"
        )
    return parts


def _set_convention(
    student: Student,
    path: Path,
    args: Mapping[str, Any],
    state: Mapping[str, Tensor],
    options: FileOptions,
) -> None:
    """Set the convention of a student of another repository. Raises ``UserError``."""
    try:
        if student.config.family == "DiT":
            _check_dit(args, options)
            return
        if student.config.family == "MMDiT" and options.checkpoint_format is None:
            options = options.model_copy(update={"checkpoint_format": "repa"})  # SiT's has none
        learned_sigma = _outputs(state, student.config) == 2
        student.convention = find_convention(
            args, state, learned_sigma=learned_sigma, options=options
        )
    except ValueError as error:
        raise UserError(f"checkpoint '{path}': {plain_text(str(error))}") from None


def _check_named_model(said: Any, model: str) -> None:
    """Raises ``ValueError`` where ``args.model`` is another one, apart from punctuation."""
    if said is not None and re.sub(r"\W|_", "", str(said)) != re.sub(r"\W", "", model):
        raise ValueError(f"its args say model {plain_text(str(said))[:60]}")


def _check_dit(args: Mapping[str, Any], options: FileOptions) -> None:
    """Raises ``ValueError`` where a file or an option says more than DiT has: noise and variance at
    1000 timesteps."""
    for name in ("checkpoint_format", "path_type", "prediction"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for SiT; DiT predicts noise")
        if args.get(name) is not None:
            raise ValueError(f"its args say {name} {args[name]!r}, an option of SiT, not of DiT")


def _has_qk_norm(
    state: Mapping[str, Tensor], config: StudentConfig, args: Mapping[str, Any]
) -> bool:
    """True where every block normalises queries and keys (REPA's --qk-norm). Raises
    ``ValueError`` where ``args`` disagree."""
    leaves = [f"{norm}.{leaf}" for norm in ("q_norm", "k_norm") for leaf in ("weight", "bias")]
    found = all(
        f"blocks.{block}.attn.{leaf}" in state
        for block in range(config.size.depth)
        for leaf in leaves
    )
    if args.get("qk_norm") and not found:
        raise ValueError("its args say qk_norm, and its blocks have no norms of queries and keys")
    return found


def _without_legacy_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """REPA's early files call the blocks behind the aligned one ``decoder_blocks`` and number them
    from 0."""
    encoder = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("decoder_blocks."):
            _, number, rest = name.split(".", 2)
            name = f"blocks.{encoder + int(number)}.{rest}"
        renamed[name] = tensor
    return renamed


def student_config(
    state: Mapping[str, Tensor], model: str, args: Mapping[str, Any], options: FileOptions
) -> tuple[StudentConfig, bool]:
    """The config of a ``model`` with the shapes in ``state``, and True if its label table has a row
    for "no class". Raises ``ValueError`` for a state of another model, ``KeyError`` if it is not a
    diffusion transformer."""
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    tokens = state["pos_embed"].shape[1]
    family, size, named_patch = re.split("[-/]", model)
    if (depth, width) != SIZES[size][:2] or patch != int(named_patch):
        fitting = [name for name, sizes in SIZES.items() if sizes[:2] == (depth, width)]
        raise ValueError(
            f"it has {depth} blocks of width {width} and patch {patch}"
            + (f", which is {family}-{fitting[0]}/{patch}" if fitting else "")
        )
    class_token = _class_token(state)
    if class_token is not None:
        tokens -= 1
    if math.isqrt(tokens) ** 2 != tokens:
        counted = f"{tokens} positions" + (" beside the class token's" if class_token else "")
        raise ValueError(f"its {counted} are not a square")
    classes, null_row = count_classes(rows, args, options.num_classes)
    config = StudentConfig(
        model=model,
        latent_size=math.isqrt(tokens) * patch,
        latent_channels=channels,
        num_classes=classes,
        class_token=class_token,
    )
    return config, null_row


def _class_token(state: Mapping[str, Tensor]) -> int | None:
    """Width of the class token that a state denoises with the latent (REG); None without one.
    Raises ``KeyError`` for the first of its weights that is missing."""
    if not any(name.startswith(CLASS_TOKEN) for name in state):
        return None
    for part in CLASS_TOKEN:
        for leaf in ("weight", "bias"):
            if part + leaf not in state:
                raise KeyError(part + leaf)
    return state["cls_projectors2.weight"].shape[1]


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
    null_context: Tensor | None = None,
) -> None:
    """Write a file that the authors' repositories read: plain data and tensors, no pickled classes.

    ``optimizer`` numbers the parameters in the order of ``join_state(model)``. ``null_context``:
    the null caption of an MMDiT, an entry of its own, because the authors' network has no such
    weight.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "model": join_state(model),
        "ema": join_state(ema),
        "opt": dict(optimizer),
        "args": dict(args),
        "steps": steps,
        **({} if null_context is None else {NULL_CONTEXT: null_context}),
    }
    temporary = path.with_name(f"{path.name}.tmp")
    torch.save(content, temporary)
    temporary.replace(path)


def _keys(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = [repr(key) for key in content]
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
