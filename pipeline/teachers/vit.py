"""Making timm's vision transformers, and what their kinds do differently."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.teachers.tap import AttentionTap
from pipeline.teachers.weights import load_weights
from schemas.errors import UserError
from schemas.extract import TeacherConfig

PIXELS_PER_TOKEN = 16  # of the crop: an autoencoder's 8 times the student's patch of 2


def create_vit(config: TeacherConfig, resolution: int) -> tuple[Any, int]:
    """The model with its weights, position embedding at the wanted grid; and its number of heads.

    A model that cannot be tapped is refused before its weights are fetched.
    """
    heads, size = _sizes(config, resolution)
    vit = _create(config, img_size=size, pretrained=config.weights == "hub")
    vit.attn_pool = None  # SigLIP's pooling: no target needs it
    if config.weights != "hub":
        load_weights(vit, config)
    _fuse_attention(vit)
    return vit, heads


def draft_vit(config: TeacherConfig, resolution: int) -> tuple[Any, int]:
    """As ``create_vit``, on the meta device: all shapes, no weights, nothing fetched."""
    heads, size = _sizes(config, resolution)
    with torch.device("meta"):
        vit = _create(config, img_size=size)
    vit.attn_pool = None
    _fuse_attention(vit)
    return vit, heads


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


def _sizes(config: TeacherConfig, resolution: int) -> tuple[int, int]:
    """Heads, and pixels per side of the image that the teacher sees."""
    with torch.device("meta"):
        draft = _create(config)
    heads = _tappable_heads(draft, config.model)
    patch = draft.patch_embed.feat_ratio()
    size = config.image_size or resolution // PIXELS_PER_TOKEN * patch
    if size < patch or size % patch:
        raise UserError(
            f"--teacher.image-size {size} is not a multiple of the teacher's patch size {patch}"
        )
    return heads, size


def _create(config: TeacherConfig, **kwargs: Any) -> Any:
    try:
        return timm.create_model(config.model, num_classes=0, **config.model_args, **kwargs)
    except Exception as error:  # timm raises whatever its model's constructor raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--teacher.model '{config.model}': {reason}") from None


def _tappable_heads(draft: Any, name: str) -> int:
    """Heads of a model on the meta device. Raises ``UserError`` where attention cannot be read."""
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
    return int(tap.calls[0].q.shape[1])


def _fuse_attention(vit: Any) -> None:
    """Whatever timm's environment variables say: taps read the fused call, and no environment
    variable may change numbers."""
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
