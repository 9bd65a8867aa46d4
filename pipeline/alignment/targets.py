"""What the student is pulled towards, from whatever cut the store holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.alignment.tail import load_tail
from pipeline.store import Store, StreamReader
from pipeline.store.codecs import column_arrays, decode_column
from pipeline.teachers import Teacher
from pipeline.teachers.tap import attention_logits
from schemas.alignment import AlignmentConfig
from schemas.errors import UserError
from schemas.fields import element_count
from schemas.store import Manifest, TeacherInfo, TeacherStream
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

    def __init__(self, name: str, stream: TeacherStream, wanted: Wanted) -> None:
        self.stream = name
        self.columns = stream.columns
        self.wanted = wanted
        self.rows = [stream.teacher.layers.index(layer) for layer in wanted.layers]
        self._index = torch.tensor(self.rows, dtype=torch.int64)

    def __call__(self, columns: Mapping[str, Tensor]) -> Targets:
        attention = None
        if self.rows:
            attention = self._decode_layers("attention", columns)
            if self.columns["attention"].codec != "float32":  # storage rounded each number alone
                attention = attention / attention.sum(-1, keepdim=True)
        return Targets(self._features(columns), attention)

    def _features(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        if not self.wanted.features:
            return None
        return decode_column("features", self.columns["features"], columns).float()

    def _decode_layers(self, name: str, columns: Mapping[str, Tensor]) -> Tensor:
        """A column (B, L, H, ...) at the wanted layers and heads, which every one of its stored
        arrays has as its first dimensions: what no loss asks for is never decoded."""
        parts = column_arrays(name, self.columns[name])
        chosen = {part: self._choose(columns[part]) for part in parts}
        return decode_column(name, self.columns[name], chosen).float()

    def _choose(self, stored: Tensor) -> Tensor:
        if stored.dtype == torch.uint16:  # bit patterns, which GPUs cannot index as such
            stored = stored.view(torch.int16)
        if self._index.device != stored.device:  # once: a list would be copied at every step
            self._index = self._index.to(stored.device)
        return stored[:, :, : self.wanted.heads].index_select(1, self._index)


class QkTargets(MapsTargets):
    """Targets from the ``qk`` cut: one matrix product gives the logits."""

    def __call__(self, columns: Mapping[str, Tensor]) -> Targets:
        attention = None
        if self.rows:
            query, key = (self._decode_layers(name, columns) for name in ("query", "key"))
            attention = torch.softmax(attention_logits(query, key), dim=-1)
        return Targets(self._features(columns), attention)


class ReplayedTargets:
    """Targets from the ``activations`` and ``image`` cuts: the rest of the teacher runs on what was
    stored, with the arithmetic that the extraction used."""

    def __init__(self, name: str, stream: TeacherStream, teacher: Teacher, wanted: Wanted) -> None:
        self.stream = name
        self.cut = stream.cut
        self.columns = stream.columns
        self.teacher = teacher
        self.wanted = wanted
        self.dtype = getattr(torch, stream.compute.precision)
        self.stop = teacher.depth if wanted.features else max(wanted.layers) + 1

    @torch.no_grad()
    def __call__(self, columns: Mapping[str, Tensor]) -> Targets:
        teacher, wanted = self.teacher, self.wanted
        name = "crop" if self.cut == "image" else "tokens"
        stored = decode_column(name, self.columns[name], columns)
        with torch.autocast(stored.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.cut == "image":
                tokens = teacher.embed(teacher.preprocess(stored.permute(0, 3, 1, 2)))
            else:
                tokens = stored.float()
            tokens, attended = teacher.tap_blocks(tokens, teacher.first_block, self.stop)
            features = teacher.normed(tokens)[0] if wanted.features else None
        attention = None
        if wanted.layers:
            logits = [attended[n].logits(teacher.prefix, wanted.heads) for n in wanted.layers]
            attention = torch.softmax(torch.stack(logits, dim=1), dim=-1)
        return Targets(features, attention)


class Wanted(NamedTuple):
    """What the losses ask of a teacher."""

    features: bool
    layers: tuple[int, ...]
    """The teacher layer of each pair, 0-based; empty without the attention loss."""
    heads: int
    """The first so many of each."""


def wanted_targets(alignment: AlignmentConfig, heads: int) -> Wanted:
    """What a run's losses ask for."""
    layers = alignment.teacher_layers if alignment.attention_weight else ()
    return Wanted(bool(alignment.feature_weight), layers, heads)


def open_targets(
    store: Store, name: str | None, wanted: Wanted, device: torch.device
) -> TargetSource:
    """The source of targets that the cut of a store's teacher stream asks for."""
    name, stream = store.manifest.teacher_stream(name)
    if wanted.layers:
        tokens = math.prod(stream.teacher.grid)
        try:
            element_count((len(wanted.layers), wanted.heads, tokens, tokens))
        except ValueError as error:
            raise UserError(f"the attention of one image in stream '{name}': {error}") from None
    if stream.cut in {"activations", "image"}:
        teacher = load_tail(store, name, sorted(set(wanted.layers)))
        return ReplayedTargets(name, stream, teacher.to(device), wanted)
    kind = MapsTargets if stream.cut == "maps" else QkTargets
    return kind(name, stream, wanted)


def read_targets(
    store: Store, shards: np.ndarray, rows: np.ndarray, wanted: Wanted, name: str | None = None
) -> Targets:
    """Targets of single samples, on the CPU, for those who look at a store. B = len(rows)."""
    source = open_targets(store, name, wanted, torch.device("cpu"))
    columns = StreamReader(store, source.stream).read(shards, rows)
    return source({part: torch.from_numpy(array) for part, array in columns.items()})


def aligned_heads(student: StudentConfig, teacher: TeacherInfo) -> int:
    """Heads that take part: student head i follows teacher head i, as many as both have."""
    return min(student.size.heads, teacher.heads)


def check_fit(alignment: AlignmentConfig, manifest: Manifest) -> None:
    """Raises ``UserError`` where the store cannot align a student so."""
    teacher = manifest.teacher_stream(alignment.stream)[1].teacher
    if alignment.attention_weight:
        lacking = sorted(set(alignment.teacher_layers) - set(teacher.layers))
        if lacking:
            raise UserError(
                f"alignment.teacher_layers asks for teacher layer {_join(lacking)}; the "
                f"store holds {_join(teacher.layers)}: extract it with --layers that include it"
            )


def _join(layers: Sequence[int]) -> str:
    return ", ".join(str(layer) for layer in layers)
