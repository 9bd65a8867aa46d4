"""Where the teacher's forward pass is frozen: what each cut keeps of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.teachers import Teacher
from schemas.extract import Cut
from schemas.store import Column, TeacherInfo

LEAVES_A_TAIL: tuple[Cut, ...] = ("image",)
"""Cuts after which training still runs a part of the teacher, whose weights the store carries."""


def cut_columns(cut: Cut, teacher: TeacherInfo, resolution: int, codec: Any) -> dict[str, Column]:
    """The columns of the cut's stream, which has the cut's name."""
    if cut == "image":
        return {"crop": Column(shape=(resolution, resolution, 3), codec="uint8")}
    tokens = teacher.grid[0] * teacher.grid[1]
    attention = (len(teacher.layers), teacher.heads, tokens, tokens)
    return {
        "features": Column(shape=(tokens, teacher.width), codec=codec),
        "class_token": Column(shape=(teacher.width,), codec=codec),
        "attention": Column(shape=attention, codec=codec),
    }


def cut_values(cut: Cut, teacher: Teacher, images_B3RR: Tensor) -> dict[str, Tensor]:
    """The cut's columns for a batch of uint8 crops; the inverse of the target sources."""
    if cut == "image":
        return {"crop": images_B3RR.permute(0, 2, 3, 1)}
    targets = teacher(images_B3RR)
    return {
        "features": targets.features,
        "class_token": targets.class_token,
        "attention": torch.softmax(targets.attention_logits.float(), dim=-1),
    }
