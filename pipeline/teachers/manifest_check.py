"""Check a manifest's description of a teacher against timm, before weights are allocated."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import timm

from pipeline.teachers.token_network import FAMILIES, TokenNetwork
from pipeline.teachers.vit import create_meta_vit, normalisation, tail_state
from schemas.errors import UserError, plain_text
from schemas.extract import TeacherConfig
from schemas.networks import TeacherInfo

MAX_BYTES = 32 << 30
"""Limit of a teacher's weights; timm's largest model has 28 GB."""
MAX_BYTES_OUTSIDE_BLOCKS = 2 << 30
"""Limit of the weights outside the blocks; an embedding of 256 x 256 tokens of width 4096 has
1 GB."""


def teacher_config(info: TeacherInfo) -> TeacherConfig:
    """Options that create the teacher of a manifest."""
    return TeacherConfig(
        model=info.model,
        model_args=info.model_args,
        weights=info.weights,
        seed=info.seed,
        image_size=info.image_size,
        mean=info.mean if info.statistics_of == "options" else None,
        std=info.std if info.statistics_of == "options" else None,
        resize=info.resize,
    )


def create_meta_teacher(info: TeacherInfo, resolution: int, where: str) -> Any:
    """timm's model of the manifest's teacher on the meta device. Raises ``UserError``, which begins
    with ``where``, if its shape differs from the manifest or its weights exceed the limits."""
    _require_vit(info.model, where)
    try:
        vit, shape = create_meta_vit(teacher_config(info), resolution, tapped=bool(info.layers))
    except (UserError, RuntimeError) as error:  # RuntimeError: sizes that overflow in torch
        raise UserError(f"{where}: {plain_text(str(error))[:300]}") from None
    mean, std = normalisation(vit)
    actual: dict[str, object] = {
        **shape._asdict(),
        "width": vit.embed_dim,
        "grid": tuple(vit.patch_embed.grid_size),
        "image_size": vit.patch_embed.img_size[0],
        "prefix": vit.num_prefix_tokens,
    }
    if info.statistics_of == "model":
        actual |= {"mean": mean, "std": std}
    for key, value in actual.items():
        if getattr(info, key) != value:
            raise UserError(
                f"{where}.{key} is {getattr(info, key)}, but that of '{info.model}' with these "
                f"model_args is {value}"
            )
    total = tail_bytes(vit, 0)
    blocks = vit.network.blocks if isinstance(vit, TokenNetwork) else vit.blocks
    outside = total - sum(p.nbytes for p in blocks.parameters())
    for size, limit, part in (
        (total, MAX_BYTES, "weights"),
        (outside, MAX_BYTES_OUTSIDE_BLOCKS, "weights outside its blocks"),
    ):
        if size > limit:
            raise UserError(
                f"{where}.model_args give '{info.model}' {size >> 20} MB of {part}; the limit is "
                f"{limit >> 20} MB"
            )
    return vit


def has_class_token(info: TeacherInfo, resolution: int, where: str) -> bool:
    """True if the first token of the manifest's teacher is a class token, not a register. Raises
    ``UserError`` as ``create_meta_teacher`` does."""
    return info.prefix > 0 and create_meta_teacher(info, resolution, where).cls_token is not None


def tail_bytes(vit: Any, first_block: int) -> int:
    """Bytes of the weights that targets need from the tokens that enter ``first_block``."""
    return sum(tensor.nbytes for tensor in tail_state(vit, first_block).values())


def _require_vit(model: str, where: str) -> None:
    """Refuse other architectures before they are created, because the arguments of some choose
    thousands of layers. Raises ``UserError``."""
    if not timm.is_model(model):
        raise UserError(f"{where}.model: timm has no model '{model}'; a newer timm may have it")
    if not timm.models.is_model_in_modules(model, _vit_modules()):
        raise UserError(f"{where}.model: '{model}' is not a vision transformer that can be tapped")


@cache
def _vit_modules() -> list[str]:
    """Last names of timm's modules that may define vision transformers: those that import or define
    such a class."""
    return [
        name.rpartition(".")[2]
        for name, module in list(sys.modules.items())
        if name.startswith("timm.models.")
        and any(
            isinstance(value, type) and issubclass(value, FAMILIES)
            for value in vars(module).values()
        )
    ]
