"""What the student is pulled towards, from whatever cut the store holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.alignment.tail import load_tail
from pipeline.store import Store
from pipeline.teachers import Teacher
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


class TargetSource(Protocol):
    """Decodes one cut's stream into targets, in batches, on the training device."""

    stream: str
    """The stream that it reads."""

    def __call__(self, columns: Mapping[str, Tensor]) -> Targets:
        """Columns of the stream (B, ...), already on the device, to targets."""


class MapsTargets:
    """Targets from the ``maps`` cut: the store holds them as they are used."""

    stream = "maps"

    def __init__(self, manifest: Manifest, alignment: AlignmentConfig, heads: int) -> None:
        stored = list(manifest.teacher.layers)
        self.layers = [stored.index(layer) for layer in alignment.teacher_layers]
        self.heads = heads
        self.alignment = alignment

    def __call__(self, columns: Mapping[str, Tensor]) -> Targets:
        features = columns["features"].float() if self.alignment.feature_weight else None
        attention = None
        if self.alignment.attention_weight:
            attention = columns["attention"][:, self.layers, : self.heads]
            if attention.dtype != torch.float32:  # storage rounded each number alone
                attention = attention.float()
                attention = attention / attention.sum(-1, keepdim=True)
        return Targets(features, attention)


class OnlineTargets:
    """Targets from the ``image`` cut: the whole teacher runs on stored crops, with the arithmetic
    that an extraction would use."""

    stream = "image"

    def __init__(
        self, teacher: Teacher, manifest: Manifest, alignment: AlignmentConfig, heads: int
    ):
        self.teacher = teacher
        self.dtype = getattr(torch, manifest.compute.precision)
        self.layers = [teacher.layers.index(layer) for layer in alignment.teacher_layers]
        self.heads = heads
        self.alignment = alignment

    @torch.no_grad()
    def __call__(self, columns: Mapping[str, Tensor]) -> Targets:
        images = columns["crop"].permute(0, 3, 1, 2)
        autocast = self.dtype != torch.float32
        with torch.autocast(images.device.type, self.dtype, enabled=autocast):
            out = self.teacher(images)
        features = out.features if self.alignment.feature_weight else None
        attention = None
        if self.alignment.attention_weight:
            logits = out.attention_logits[:, self.layers, : self.heads]
            attention = torch.softmax(logits.float(), dim=-1)
        return Targets(features, attention)


def open_targets(
    store: Store, alignment: AlignmentConfig, heads: int, device: torch.device
) -> TargetSource:
    """The source of targets that the store's cut asks for."""
    manifest = store.manifest
    if manifest.cut == "image":
        layers = sorted(set(alignment.teacher_layers)) if alignment.attention_weight else ()
        return OnlineTargets(load_tail(store, layers).to(device), manifest, alignment, heads)
    return MapsTargets(manifest, alignment, heads)


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


def _join(layers: Sequence[int]) -> str:
    return ", ".join(str(layer) for layer in layers)
