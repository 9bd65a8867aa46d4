"""What the student is pulled towards, from whatever cut the store holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from schemas.alignment import AlignmentConfig
from schemas.errors import UserError
from schemas.store import Manifest
from schemas.student import StudentConfig


class Targets(NamedTuple):
    """One batch of targets on the training device; None where a loss does not ask for it."""

    features: Tensor | None
    """(B, N, D_teacher)."""
    attention: Tensor | None
    """(B, L, H, N, N) probabilities, rows summing to 1, float32."""


class MapsTargets:
    """Targets from the ``maps`` cut: the store holds them as they are used."""

    stream = "maps"

    def __init__(self, manifest: Manifest, alignment: AlignmentConfig, heads: int) -> None:
        stored = list(manifest.teacher.layers)
        self.layers = [stored.index(layer) for layer in alignment.teacher_layers]
        self.heads = heads
        self.alignment = alignment

    def __call__(self, columns: Mapping[str, Tensor]) -> Targets:
        """Columns of the stream, already on the device, to targets."""
        features = columns["features"].float() if self.alignment.feature_weight else None
        attention = None
        if self.alignment.attention_weight:
            probs = columns["attention"][:, self.layers, : self.heads].float()
            attention = probs / probs.sum(-1, keepdim=True)  # storage rounds each number alone
        return Targets(features, attention)


def stored_values(features: Tensor, class_token: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """The ``maps`` cut's columns for a batch of teacher outputs; the inverse of ``MapsTargets``."""
    return {
        "features": features,
        "class_token": class_token,
        "attention": torch.softmax(logits.float(), dim=-1),
    }


def aligned_heads(student: StudentConfig, manifest: Manifest) -> int:
    """Heads that take part: student head i follows teacher head i, as many as both have."""
    return min(student.size.heads, manifest.teacher.heads)


def check_fit(alignment: AlignmentConfig, student: StudentConfig, manifest: Manifest) -> None:
    """Raises ``UserError`` where the store cannot align this student so."""
    teacher = manifest.teacher
    if alignment.attention_weight:
        lacking = sorted(set(alignment.teacher_layers) - set(teacher.layers))
        if lacking:
            raise UserError(
                f"alignment.teacher_layers asks for teacher layer {_join(lacking)}; the "
                f"store holds {_join(teacher.layers)}: extract it with --layers that include it"
            )
    rows = student.latent_size // student.size.patch_size
    if teacher.grid != (rows, rows):
        raise UserError(
            f"the teacher's {teacher.grid[0]}x{teacher.grid[1]} tokens in the store do not match "
            f"the student's {rows}x{rows}"
        )


def _join(layers: Sequence[int]) -> str:
    return ", ".join(str(layer) for layer in layers)
