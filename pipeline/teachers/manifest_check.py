"""Whether timm makes the teacher that a manifest describes, told before any of it is allocated."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import timm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from pipeline.teachers.vit import draft_vit, normalisation, tail_state
from schemas.errors import UserError
from schemas.extract import TeacherConfig
from schemas.store import TeacherInfo

MAX_BYTES = 32 << 30
"""Of a teacher's weights; 28 GB are the largest that timm knows."""
MAX_OUTSIDE_BYTES = 2 << 30
"""Of those that are outside its blocks: 1 GB is the embedding of 256 x 256 tokens of width 4096."""


def declared_config(about: TeacherInfo) -> TeacherConfig:
    """The options under which the teacher of a manifest was made."""
    return TeacherConfig(
        model=about.model,
        model_args=about.model_args,
        weights=about.weights,
        seed=about.seed,
        image_size=about.image_size,
    )


def draft_declared(about: TeacherInfo, resolution: int, where: str) -> Any:
    """timm's model on the meta device. Raises ``UserError``, which begins with ``where``, if it is
    not what the manifest says of it, or too large to be meant."""
    _require_vit(about.model, where)
    try:
        vit, shape = draft_vit(declared_config(about), resolution)
    except (UserError, RuntimeError) as error:  # torch's: sizes that overflow
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from None
    mean, std = normalisation(vit)
    made: dict[str, object] = {
        **shape._asdict(),
        "width": vit.embed_dim,
        "grid": tuple(vit.patch_embed.grid_size),
        "image_size": vit.patch_embed.img_size[0],
        "prefix": vit.num_prefix_tokens,
        "mean": mean,
        "std": std,
    }
    for key, value in made.items():
        if getattr(about, key) != value:
            raise UserError(
                f"{where}.{key} is {getattr(about, key)}, but that of '{about.model}' with these "
                f"model_args is {value}"
            )
    whole = state_bytes(vit, 0)
    outside = whole - sum(p.nbytes for p in vit.blocks.parameters())
    for size, most, what in (
        (whole, MAX_BYTES, "weights"),
        (outside, MAX_OUTSIDE_BYTES, "weights outside its blocks"),
    ):
        if size > most:
            raise UserError(
                f"{where}.model_args give '{about.model}' {size >> 20} MB of {what}; the limit is "
                f"{most >> 20} MB"
            )
    return vit


def state_bytes(vit: Any, first_block: int) -> int:
    """Of the weights that targets need once the tokens that enter ``first_block`` are known."""
    return sum(tensor.nbytes for tensor in tail_state(vit, first_block).values())


def _require_vit(model: str, where: str) -> None:
    """Refuse what could not be tapped before it is made: of some other kinds arguments choose how
    many thousand layers there are."""
    if not timm.is_model(model):
        raise UserError(f"{where}.model: timm knows no '{model}'; update it, if it is a new one")
    if not timm.models.is_model_in_modules(model, _modules_of_vits()):
        raise UserError(f"{where}.model: '{model}' is no vision transformer that can be tapped")


@cache
def _modules_of_vits() -> list[str]:
    """timm's modules, by their last names, whose models may be one: they have the class at hand."""
    return [
        name.rpartition(".")[2]
        for name, module in list(sys.modules.items())
        if name.startswith("timm.models.")
        and any(
            isinstance(value, type) and issubclass(value, VisionTransformer | Eva)
            for value in vars(module).values()
        )
    ]
