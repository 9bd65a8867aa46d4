"""Converters: stored arrays of a batch to the stored arrays of the converted stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from pipeline.convert.streams import OF_LAYERS, StreamPlan
from pipeline.store.codecs import column_arrays, decode_column, relayout
from pipeline.targets.cuts import class_values, cut_values, encode_values, later_cut_values
from pipeline.teachers import Teacher
from pipeline.teachers.attention_tap import qk_logits
from schemas.streams import ClassStream, TeacherStream

Arrays = Mapping[str, np.ndarray]
"""Stored arrays (B, ...) by part name."""
Converter = Callable[[Arrays], Arrays]
"""Source arrays of a batch -> target arrays. Pure and thread-safe. Raises ``NotFiniteError``."""


def open_converter(plan: StreamPlan, teacher: Teacher | None, device: torch.device) -> Converter:
    """The converter of a stream's plan; ``teacher`` is the tail when the plan replays it."""
    if plan.before == plan.after or not isinstance(plan.before, TeacherStream):
        return lambda arrays: arrays
    if isinstance(plan.after, ClassStream):
        copied = not plan.computes
        return (lambda arrays: arrays) if copied else ClassTokensComputed(plan, teacher, device)
    if plan.replays:
        assert teacher is not None
        return Replayed(plan, teacher, device)
    return Recoded(plan, device)


class Recoded:
    """Re-encodes tensors with other codecs, selects layers, computes maps from queries and keys."""

    def __init__(self, plan: StreamPlan, device: torch.device) -> None:
        self.plan = plan
        self.device = device

    @torch.inference_mode()
    def __call__(self, arrays: Arrays) -> Arrays:
        out: dict[str, np.ndarray] = {}
        values: dict[str, Tensor] = {}
        for name, column in self.plan.after.columns.items():
            if self.plan.copies(name):
                out |= {
                    part: self._rows(name, arrays[part]) for part in column_arrays(name, column)
                }
            elif self.plan.moves(name):
                out |= _to_numpy(
                    relayout(
                        name, self.plan.before.columns[name], column, self._parts(name, arrays)
                    )
                )
            elif name == "attention" and name not in self.plan.before.columns:
                query, key = self._decode("query", arrays), self._decode("key", arrays)
                values[name] = torch.softmax(qk_logits(query, key), dim=-1)
            else:
                values[name] = self._decode(name, arrays)
        columns = {name: self.plan.after.columns[name] for name in values}
        return out | _to_numpy(encode_values(columns, values))

    def _decode(self, name: str, arrays: Arrays) -> Tensor:
        column = self.plan.before.columns[name]
        values = decode_column(name, column, self._parts(name, arrays)).float()
        if name == "attention" and column.codec != "float32":
            values = values / values.sum(-1, keepdim=True)  # as in MapsTargets
        return values

    def _parts(self, name: str, arrays: Arrays) -> dict[str, Tensor]:
        return {
            part: _to_device(self._rows(name, arrays[part]), self.device)
            for part in column_arrays(name, self.plan.before.columns[name])
        }

    def _rows(self, name: str, array: np.ndarray) -> np.ndarray:
        rows = self.plan.rows
        return array if rows is None or name not in OF_LAYERS else array[:, rows]


class Replayed:
    """Computes a later cut by running the teacher's tail on the stored tensors, with the precision
    of the extraction."""

    def __init__(self, plan: StreamPlan, teacher: Teacher, device: torch.device) -> None:
        assert isinstance(plan.before, TeacherStream)
        assert isinstance(plan.after, TeacherStream)
        self.before = plan.before
        self.after = plan.after
        self.teacher = teacher
        self.device = device
        self.dtype = getattr(torch, plan.before.compute.precision)

    @torch.inference_mode()
    def __call__(self, arrays: Arrays) -> Arrays:
        name = "crop" if self.before.cut == "image" else "tokens"
        parts = {part: _to_device(array, self.device) for part, array in arrays.items()}
        stored = decode_column(name, self.before.columns[name], parts)
        cut, teacher = self.after.cut, self.teacher
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.before.cut == "image":
                values = cut_values(cut, teacher, stored.permute(0, 3, 1, 2))
            else:
                values = later_cut_values(cut, teacher, stored.float(), teacher.first_block)
        return _to_numpy(encode_values(self.after.columns, values))


class ClassTokensComputed:
    """Computes class tokens from the columns of a teacher stream that the plan reads, with the
    precision of the extraction. ``teacher`` is the tail, where the cut has one."""

    def __init__(self, plan: StreamPlan, teacher: Teacher | None, device: torch.device) -> None:
        assert isinstance(plan.before, TeacherStream)
        assert isinstance(plan.after, ClassStream)
        assert plan.reads is not None
        self.before = plan.before
        self.after = plan.after
        self.columns = {name: plan.before.columns[name] for name in plan.reads}
        self.teacher = teacher
        self.device = device
        self.dtype = getattr(torch, plan.before.compute.precision)

    @torch.inference_mode()
    def __call__(self, arrays: Arrays) -> Arrays:
        parts = {part: _to_device(array, self.device) for part, array in arrays.items()}
        stored = {name: decode_column(name, spec, parts) for name, spec in self.columns.items()}
        if "crop" not in stored:
            stored = {name: tensor.float() for name, tensor in stored.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            values = class_values(self.after.token, self.before.cut, self.teacher, stored)
        return _to_numpy(encode_values(self.after.columns, values))


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _to_numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {part: tensor.cpu().numpy() for part, tensor in tensors.items()}
