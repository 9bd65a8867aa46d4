"""Conventions of the SiT, REPA and HASTE repositories, recognised in a checkpoint file.

SiT's repository has noise at time 0 and data at time 1, REPA's and HASTE's the reverse. Path and
prediction are command-line options of their training, which a checkpoint stores under ``args``;
each repository spells their values in its own way.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from schemas.diffusion import Convention, DiffusionConfig
from schemas.networks import AutoencoderInfo, TextEncoderInfo
from schemas.sample import CheckpointFormat, FileOptions
from schemas.student import StudentConfig

SPELLINGS: dict[str, dict[str, tuple[CheckpointFormat, str]]] = {
    "path_type": {
        "Linear": ("sit", "linear"),
        "GVP": ("sit", "cosine"),
        "linear": ("repa", "linear"),
        "cosine": ("repa", "cosine"),
    },
    "prediction": {
        "velocity": ("sit", "velocity"),
        "noise": ("sit", "noise"),
        "score": ("sit", "score"),
        "v": ("repa", "velocity"),
    },
}
"""Repository and meaning of the values of ``args``."""
OPTIONS = {"sit": ("loss_weight", "train_eps"), "repa": ("enc_type", "encoder_depth", "proj_coeff")}
"""Other options that only one of the repositories has."""
UNKNOWN = {
    "joint_blocks.": "text conditioning (MM-DiT, drawn with --model MMDiT-24)",
    "context_embedder.": "text conditioning (MM-DiT, drawn with --model MMDiT-24)",
    "bn.": "a batch norm of its latents (REPA-E)",
    "feat_rope.": "rotary position embeddings (LightningDiT)",
    "decoder_pos_embed": "a masked decoder (MaskDiT, MDT)",
    "mask_token": "a masked decoder (MaskDiT, MDT)",
}
"""Parts of other students, by the first letters of their weights."""
UNKNOWN_IN_BLOCKS = {
    "mlp.w12.": "SwiGLU layers (LightningDiT)",
    "mlp.w1.": "SwiGLU layers",
    "norm1.": "norms with weights (LightningDiT)",
}


class ExportedRun(NamedTuple):
    """Facts that ``export_checkpoint`` writes under ``args``."""

    student: StudentConfig
    diffusion: DiffusionConfig
    autoencoder: AutoencoderInfo | None
    """None in exports of earlier versions."""
    text_encoder: TextEncoderInfo | None = None
    """That of the captions of an MMDiT; None for other students."""


def args_of(content: Any) -> dict[str, Any]:
    """The options that a checkpoint stores, {} for a bare state dict."""
    args = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(args, argparse.Namespace):
        return dict(vars(args))
    return dict(args) if isinstance(args, Mapping) else {}


def exported_run(args: Mapping[str, Any]) -> ExportedRun | None:
    """None for files of other repositories. Raises ``ValueError`` for values of another version of
    this software."""
    if not (
        isinstance(args.get("student"), Mapping) and isinstance(args.get("diffusion"), Mapping)
    ):
        return None
    autoencoder, text = args.get("autoencoder"), args.get("text_encoder")
    return ExportedRun(
        StudentConfig.model_validate(args["student"]),
        DiffusionConfig.model_validate(args["diffusion"]),
        None if autoencoder is None else AutoencoderInfo.model_validate(autoencoder),
        None if text is None else TextEncoderInfo.model_validate(text),
    )


def find_convention(
    args: Mapping[str, Any], names: Iterable[str], *, learned_sigma: bool, options: FileOptions
) -> Convention:
    """The convention of a SiT in a file of another repository, from its ``args``, the names of its
    weights and what the command line adds. Raises ``ValueError`` where they disagree or do not
    suffice."""
    path = _resolve("path_type", args, options.path_type) or "linear"
    prediction = _resolve("prediction", args, options.prediction) or "velocity"
    clues = _clues(args, learned_sigma=learned_sigma)
    if not clues:
        clues = _weak_clues(args, names)
    formats = {name for name, _ in clues}
    chosen = options.checkpoint_format
    shown = ", ".join(clue for _, clue in clues)
    if chosen is not None:
        if formats and chosen not in formats:
            raise ValueError(f"--checkpoint-format {chosen} contradicts its {shown}")
    elif len(formats) != 1:
        reason = f"of {shown}, some are SiT's and some REPA's" if formats else "nothing in it says"
        raise ValueError(
            f"{reason}: is data at time 1, as in SiT's repository (--checkpoint-format sit), or at "
            "time 0, as in REPA's and HASTE's (--checkpoint-format repa)?"
        )
    else:
        chosen = formats.pop()
    return Convention.model_validate(
        {"path": path, "prediction": prediction, "data_time": 1 if chosen == "sit" else 0}
    )


def count_classes(rows: int, args: Mapping[str, Any], option: int | None) -> tuple[int, bool]:
    """Number of classes of a label table, and True if its last row is "no class". Raises
    ``ValueError``."""
    said, drop = args.get("num_classes"), args.get("cfg_prob", args.get("class_dropout_prob"))
    if said is None and option is None and (drop == 0 or rows % 10 == 0):
        raise ValueError(
            f"its label table has {rows} rows: are they {rows} classes (--num-classes {rows}), or "
            f"{rows - 1} and one for no class (--num-classes {rows - 1})?"
        )
    if said is None:
        classes = rows - 1 if option is None else option
    elif not isinstance(said, int):
        raise ValueError(f"its args say num_classes {said!r}, which is not a number")
    elif option not in (None, said):
        raise ValueError(f"its args say num_classes {said}, --num-classes says {option}")
    else:
        classes = said
    if classes < 1 or rows - classes not in (0, 1):
        raise ValueError(f"its label table has {rows} rows, for {classes} classes")
    if isinstance(drop, int | float) and drop > 0 and rows == classes:
        raise ValueError(f"it drops labels ({drop:g}), so {classes} classes need {rows + 1} rows")
    return classes, rows > classes


def unknown_part(names: Iterable[str]) -> str | None:
    """A part of the student that this project does not draw, with the name of one of its weights;
    None if there is no such part."""
    for name in names:
        for start, part in UNKNOWN.items():
            if name.startswith(start):
                return f"{part}: {name}"
        for start, part in UNKNOWN_IN_BLOCKS.items():
            if name.startswith("blocks.") and name.split(".", 2)[-1].startswith(start):
                return f"{part}: {name}"
    return None


def _resolve(name: str, args: Mapping[str, Any], option: str | None) -> str | None:
    """The meaning of one of ``args``, or the option of that name where the file does not say it."""
    said = args.get(name)
    shown_option = f"--{name.replace('_', '-')}"
    if said is None:
        return option
    known = SPELLINGS[name]
    if not isinstance(said, str) or said not in known:
        raise ValueError(
            f"its args say {name} {said!r}; only {', '.join(known)} can be drawn (if that is "
            f"another word for one of them, save the weights alone and give {shown_option})"
        )
    meaning = known[said][1]
    if option not in (None, meaning):
        raise ValueError(f"its args say {name} {said}, {shown_option} says {option}")
    return meaning


def _clues(args: Mapping[str, Any], *, learned_sigma: bool) -> list[tuple[CheckpointFormat, str]]:
    """Repositories that the file points to, each with the reason."""
    clues = [
        (known[args[name]][0], f"{name} {args[name]}")
        for name, known in SPELLINGS.items()
        if args.get(name) is not None
    ]
    return [*clues, ("sit", "learn_sigma half")] if learned_sigma else clues


def _weak_clues(
    args: Mapping[str, Any], names: Iterable[str]
) -> list[tuple[CheckpointFormat, str]]:
    """The same for files that neither say path and prediction nor have a variance."""
    clues: list[tuple[CheckpointFormat, str]] = []
    if any(name.startswith("projectors.") for name in names):
        clues.append(("repa", "projectors"))
    if any(name.startswith("cls_projectors2.") for name in names):  # REG is made from REPA
        clues.append(("repa", "class token"))
    for name in args:
        clues += [("sit", name)] if name in OPTIONS["sit"] else []
        clues += [("repa", name)] if name in OPTIONS["repa"] else []
    return clues
