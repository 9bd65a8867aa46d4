"""Making timm's vision transformers, and what their kinds do differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.teachers.attention_tap import AttentionTap
from pipeline.teachers.weights import load_tail_weights, load_weights
from schemas.errors import UserError
from schemas.extract import TeacherConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PIXELS_PER_TOKEN = 16  # of the crop: an autoencoder's 8 times the student's patch of 2


class VitShape(NamedTuple):
    """Of the whole model."""

    depth: int
    heads: int
    head_width: int


def create_vit(config: TeacherConfig, resolution: int) -> tuple[Any, VitShape]:
    """The model with its weights, position embedding at the wanted grid; and its shape.

    A model that cannot be tapped is refused before its weights are fetched.
    """
    shape, size = _sizes(config, resolution)
    vit = _create(config, img_size=size, pretrained=config.weights == "hub")
    vit.attn_pool = None  # SigLIP's pooling: no target needs it
    if config.weights != "hub":
        load_weights(vit, config)
    _fuse_attention(vit)
    return vit, shape


def create_tail(
    config: TeacherConfig, resolution: int, first_block: int, state: Mapping[str, Tensor]
) -> tuple[Any, VitShape]:
    """The same with only the blocks from ``first_block`` on, and their weights (``tail_state``).
    Raises ``ValueError`` where these are another model's."""
    shape, size = _sizes(config, resolution)
    vit = _create(config, img_size=size, depth=shape.depth - first_block)
    vit.attn_pool = None
    load_tail_weights(vit, state, whole=not first_block)
    _fuse_attention(vit)
    return vit, shape


def tail_state(vit: Any, first_block: int) -> dict[str, Tensor]:
    """The weights that targets need once the tokens that enter ``first_block`` are known: those of
    the blocks from there on, counted from 0, of the norm behind them and of learnt rotary
    embeddings. The whole state for block 0."""
    state: dict[str, Tensor] = vit.state_dict()
    if not first_block:
        return state
    tail = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        if head == "blocks":
            number, _, leaf = rest.partition(".")
            if int(number) >= first_block:
                tail[f"blocks.{int(number) - first_block}.{leaf}"] = value
        elif head == "rope" and vit.rope_mixed:  # (2, depth, heads, d / 2)
            tail[name] = value[:, first_block:]
        elif head in {"norm", "fc_norm", "rope"}:
            tail[name] = value
    return tail


def draft_vit(config: TeacherConfig, resolution: int) -> tuple[Any, VitShape]:
    """As ``create_vit``, on the meta device: all shapes, no weights, nothing fetched."""
    shape, size = _sizes(config, resolution)
    with torch.device("meta"):
        vit = _create(config, img_size=size)
    vit.attn_pool = None
    _fuse_attention(vit)
    return vit, shape


def normalisation(vit: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the pixels that a model was trained on."""
    about: dict[str, Any] = vit.pretrained_cfg
    mean, std = about.get("mean") or IMAGENET_MEAN, about.get("std") or IMAGENET_STD
    return tuple(mean), tuple(std)


def embed(vit: Any, pixels_B3SS: Tensor) -> Tensor:
    """The tokens (B, P + N, D) that enter block 0: P prefix tokens, then patches row by row."""
    tokens = vit._pos_embed(vit.patch_embed(pixels_B3SS))
    if isinstance(tokens, tuple):  # Eva returns its rotary embedding with them
        tokens = tokens[0]
    return vit.norm_pre(tokens)


def block_arguments(vit: Any) -> list[dict[str, Tensor]]:
    """What each block takes besides its tokens: rotary embeddings, in models that have them.

    They follow from the patch grid (and, where they are learnt, from weights) alone, so blocks can
    run without the embedding of the image.
    """
    if getattr(vit, "rope", None) is None:
        return [{}] * len(vit.blocks)
    rope = vit.rope.get_embed(shape=vit.patch_embed.grid_size)
    if vit.rope_mixed:  # one per block
        return [{"rope": one} for one in rope]
    return [{"rope": rope}] * len(vit.blocks)


def final_norm(vit: Any) -> nn.Module:
    """The norm behind the last block. Models that pool by averaging have it behind the pooling
    (timm's ``fc_norm``); it then does for tokens what it was trained to do for their mean."""
    for norm in (vit.norm, vit.fc_norm):
        if not isinstance(norm, nn.Identity):
            return norm
    return nn.Identity()


def _sizes(config: TeacherConfig, resolution: int) -> tuple[VitShape, int]:
    """Shape, and pixels per side of the image that the teacher sees."""
    with torch.device("meta"):
        draft = _create(config)
    shape = _tappable_shape(draft, config.model)
    patch = draft.patch_embed.feat_ratio()
    size = config.image_size or resolution // PIXELS_PER_TOKEN * patch
    if size < patch or size % patch:
        raise UserError(
            f"--teacher.image-size {size} is not a multiple of the teacher's patch size {patch}"
        )
    return shape, size


def _create(config: TeacherConfig, **kwargs: Any) -> Any:
    try:
        return timm.create_model(config.model, num_classes=0, **{**config.model_args, **kwargs})
    except Exception as error:  # timm raises whatever its model's constructor raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--teacher.model '{config.model}': {reason}") from None


def _tappable_shape(draft: Any, name: str) -> VitShape:
    """That of a model on the meta device. Raises ``UserError`` where attention cannot be read."""
    if not isinstance(draft, VisionTransformer | Eva):
        raise UserError(
            f"--teacher.model '{name}': the attention of a {type(draft).__name__} cannot be "
            "tapped; take a plain vision transformer (DINOv2, DINOv3, CLIP, MAE, SigLIP, ...)"
        )
    _fuse_attention(draft)
    tokens = draft.num_prefix_tokens + draft.patch_embed.num_patches
    with AttentionTap() as tap:
        draft.blocks[0](
            torch.empty(1, tokens, draft.embed_dim, device="meta"), **block_arguments(draft)[0]
        )
    if len(tap.calls) != 1 or not tap.calls[0].plain:
        kind = type(draft.blocks[0]).__name__
        raise UserError(
            f"--teacher.model '{name}': its blocks ({kind}) do not hold one plain attention each "
            "and cannot be tapped; take another vision transformer"
        )
    _, heads, _, head_width = tap.calls[0].q.shape
    return VitShape(len(draft.blocks), int(heads), int(head_width))


def _fuse_attention(vit: Any) -> None:
    """Whatever timm's environment variables say: taps read the fused call, and no environment
    variable may change numbers."""
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
