"""Tensors that each cut stores for one image, and their shapes."""

from __future__ import annotations

from typing import Protocol

from schemas.extract import Cut


class TeacherShape(Protocol):
    """Sizes of the teacher that determine those of a cut, as in a manifest's ``TeacherInfo``."""

    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def prefix(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def layers(self) -> tuple[int, ...]: ...


def cut_shapes(cut: Cut, teacher: TeacherShape, resolution: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that a cut stores for one image, in the order of its columns."""
    if cut == "image":
        return {"crop": (resolution, resolution, 3)}
    tokens = teacher.grid[0] * teacher.grid[1]
    if cut == "activations":
        return {"tokens": (teacher.prefix + tokens, teacher.width)}
    pooled = {"features": (tokens, teacher.width), "class_token": (teacher.width,)}
    layers, heads = len(teacher.layers), teacher.heads
    if not layers:
        return pooled
    if cut == "maps":
        return {**pooled, "attention": (layers, heads, tokens, tokens)}
    factor = (layers, heads, tokens, teacher.head_width)
    return {**pooled, "query": factor, "key": factor}
