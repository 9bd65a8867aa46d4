"""Kinds of feature targets: teacher tokens that a store's cut gives, and their normalisation.

A new kind is a function here, an entry of ``TARGET_KINDS`` and a word of ``TargetKind`` in
``schemas/alignment.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.teachers.attention_tap import AttentionOperands
from schemas.alignment import StreamAlignment, TargetKind
from schemas.errors import UserError
from schemas.streams import TeacherStream

if TYPE_CHECKING:
    from pipeline.teachers import Teacher

Attended = dict[int, AttentionOperands]
"""Attention operands of the teacher's tapped layers."""
Read = Callable[["Teacher", Tensor, Sequence[int]], tuple[Tensor, Attended]]
"""(teacher, tokens (B, P + N, D) that enter its first block, layers) -> features (B, N, D),
float32, without the rows of class and register tokens, and attention operands."""


def final(teacher: Teacher, tokens: Tensor, layers: Sequence[int]) -> tuple[Tensor, Attended]:
    """Tokens after the final norm (REPA, arXiv 2410.06940, with DINOv2; HASTE)."""
    tokens, attended = teacher.tap_blocks(tokens, teacher.first_block)
    return teacher.normed(tokens)[0], attended


def unnormed(teacher: Teacher, tokens: Tensor, layers: Sequence[int]) -> tuple[Tensor, Attended]:
    """Tokens before the final norm, as the code of REPA (arXiv 2410.06940) and iREPA (arXiv
    2512.10794) takes them of CLIP and MAE."""
    tokens, attended = teacher.tap_blocks(tokens, teacher.first_block)
    return tokens[:, teacher.prefix :].float(), attended


def sum_of_layers(
    teacher: Teacher, tokens: Tensor, layers: Sequence[int]
) -> tuple[Tensor, Attended]:
    """Sum over ``layers`` of their output tokens, each after the final norm (RAEv2, arXiv
    2605.18324: every second layer of DINOv3-L, 11 to 23).

    RAEv2's code takes the mean, which has the same cosine, by default removes the affine part of
    the norm, and adds the mean token of the last layer for DINOv3; here neither is done.
    """
    attended: Attended = {}
    total, start = torch.zeros((), device=tokens.device), teacher.first_block
    for layer in layers:
        tokens, found = teacher.tap_blocks(tokens, start, layer + 1)
        attended |= found
        total, start = total + teacher.normed(tokens)[0], layer + 1
    _, found = teacher.tap_blocks(tokens, start, max(teacher.layers, default=-1) + 1)
    return total, attended | found


TARGET_KINDS: dict[TargetKind, Read] = {
    "final": final,
    "unnormed": unnormed,
    "sum_of_layers": sum_of_layers,
}
STORED: TargetKind = "final"
"""The kind that the cuts maps and qk hold. Every other one is read from the teacher's blocks, which
these cuts cannot run."""

REPLAYED = ("activations", "image")
"""Cuts after which training runs the teacher's last blocks."""


def check_target(options: StreamAlignment, name: str, stream: TeacherStream, *, at: str) -> None:
    """Raises ``UserError`` where the cut of the stream ``name`` cannot give the target that
    ``options``, those of the key ``at``, ask for."""
    if options.target != STORED and stream.cut not in REPLAYED:
        raise UserError(
            f"{at}.target {options.target}: stream '{name}' of cut '{stream.cut}' holds features "
            "after the teacher's final norm only: add a stream of cut activations or image "
            "(extract --add-stream NAME --cut activations), or use target final"
        )
    teacher = stream.teacher
    if options.target != STORED and not teacher.layers:
        raise UserError(
            f"{at}.target {options.target} is read between the teacher's blocks; stream '{name}' "
            "was extracted with --layers none: extract another with --layers, or use target final"
        )
    first = teacher.layers[0] if stream.cut == "activations" else 0
    missing = [n for n in options.target_layers or () if not first <= n < teacher.depth]
    if missing:
        raise UserError(
            f"{at}.target_layers asks for teacher layer {missing[0]}; stream '{name}' gives layers "
            f"{first} to {teacher.depth - 1}"
        )
    if options.normalisation == "spatial" and math.prod(teacher.grid) < 2:
        raise UserError(
            f"{at}.normalisation spatial: stream '{name}' has one token, which has no deviation"
        )


FLAT = 1e-3
"""Standard deviation over the tokens, relative to the mean, up to which a channel is constant. Of
float16 numbers that differ in the last bit only it is half of that."""


def spatially_normalised(features_BND: Tensor, strength: float) -> Tensor:
    """(x - strength mean) / (std + 1e-6), with mean and unbiased standard deviation of each channel
    over the tokens of one image (iREPA, arXiv 2512.10794, section 4.2).

    A channel that is constant over an image becomes 0, because it has no spatial structure. The
    formula alone makes it (1 - strength) mean / 1e-6, which would decide every cosine.
    """
    std, mean = torch.std_mean(features_BND, dim=1, keepdim=True)
    normalised = (features_BND - strength * mean) / (std + 1e-6)
    return torch.where(std > FLAT * mean.abs(), normalised, 0.0)


def target_normalisation(
    strength: float | None, *, compiled: bool = False
) -> Callable[[Tensor], Tensor]:
    """``spatially_normalised`` of this strength; None: the identity. ``compiled``: in one pass."""
    if strength is None:
        return lambda features: features

    def normalise(features_BND: Tensor) -> Tensor:
        return spatially_normalised(features_BND, strength)

    return torch.compile(normalise, dynamic=False) if compiled else normalise
