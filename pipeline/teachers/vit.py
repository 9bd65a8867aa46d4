"""Create timm's vision transformers and cover the differences between their architectures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.storage.hub import HubUnreachableError, hub_access
from pipeline.teachers.attention_tap import AttentionTap
from pipeline.teachers.token_network import FAMILIES, TokenGrid, TokenNetwork, find_grid
from pipeline.teachers.weights import load_tail_weights, load_weights
from schemas.errors import UserError, plain_text
from schemas.extract import IMAGENET_MEAN, IMAGENET_STD, TeacherConfig

HUB_FILES = ("pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of timm's weights on the hub, where they are not model.safetensors."""
PIXELS_PER_TOKEN = (
    16  # pixels of the crop per side: the autoencoder's 8 times the student's patch of 2
)

INITIALISING = {"add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_"}
"""In-place functions of the initialisations of weights."""


class _NoInitialisation(TorchFunctionMode):
    """Leave tensors on the meta device as they are: they have no values, but to initialise them
    takes four fifths of a model's creation there."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tensor = args[0] if args else (kwargs or {}).get("tensor")  # as torch.nn.init passes it
        named = getattr(func, "__name__", None) in INITIALISING
        if named and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **(kwargs or {}))


class VitShape(NamedTuple):
    """Shape of the complete model, also where only its tail is created."""

    depth: int
    heads: int
    head_width: int


def create_vit(
    config: TeacherConfig, resolution: int, *, tapped: bool = True
) -> tuple[Any, VitShape]:
    """The model with its weights and the position embedding at the grid of ``config``; its shape.
    One whose attention cannot be read is a ``TokenNetwork``.

    Raises ``UserError``; with ``tapped`` such a model is refused before its weights are fetched.
    """
    shape, size, grid = _sizes(config, resolution, tapped)
    vit = _download(config, size) if config.weights == "hub" else _create(config, img_size=size)
    vit.attn_pool = None  # SigLIP's pooling, which no target needs
    if config.weights != "hub":
        load_weights(vit, config)
    _fuse_attention(vit)
    return vit if grid is None else TokenNetwork(vit, grid), shape


def create_tail(
    config: TeacherConfig,
    resolution: int,
    first_block: int,
    state: Mapping[str, Tensor],
    *,
    tapped: bool = True,
) -> tuple[Any, VitShape]:
    """The model with only the blocks from ``first_block`` on and the weights ``state``
    (``tail_state``). Raises ``ValueError`` if these are of another model."""
    shape, size, grid = _sizes(config, resolution, tapped)
    depth = {} if grid else {"depth": shape.depth - first_block}
    vit = _create(config, img_size=size, **depth)
    vit.attn_pool = None
    load_tail_weights(vit, state, complete=not first_block)
    _fuse_attention(vit)
    return vit if grid is None else TokenNetwork(vit, grid), shape


def tail_state(vit: Any, first_block: int) -> dict[str, Tensor]:
    """Weights that targets need from the tokens that enter ``first_block``: the blocks from there
    on, renumbered from 0, the norm after them and learnt rotary embeddings. For block 0 the
    complete state."""
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


def create_meta_vit(
    config: TeacherConfig, resolution: int, *, tapped: bool = True
) -> tuple[Any, VitShape]:
    """As ``create_vit``, on the meta device: all shapes, no weights; nothing is downloaded."""
    shape, size, grid = _sizes(config, resolution, tapped)
    with torch.device("meta"), _NoInitialisation():
        vit = _create(config, img_size=size)
    vit.attn_pool = None
    _fuse_attention(vit)
    return vit if grid is None else TokenNetwork(vit, grid), shape


def normalisation(vit: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the pixels that timm's weights of a model were trained with."""
    return _statistics(vit.pretrained_cfg)


def named_normalisation(model: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """As ``normalisation``, by the model's name. Raises ``UserError`` for an unknown one."""
    try:
        config = timm.models.get_pretrained_cfg(model)
    except RuntimeError as error:
        raise UserError(f"--teacher.model '{model}': {plain_text(str(error))[:200]}") from None
    return _statistics({} if config is None else config.to_dict())


def _statistics(config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = config.get("mean") or IMAGENET_MEAN, config.get("std") or IMAGENET_STD
    return tuple(mean), tuple(std)


@contextlib.contextmanager
def weights_access(model: str) -> Iterator[None]:
    """Let timm load its weights of ``model``. Raises ``HubUnreachableError``."""
    known = timm.models.get_pretrained_cfg(model)
    if known is None or not known.hf_hub_id:
        yield
        return
    files = (known.hf_hub_filename or "model.safetensors", *HUB_FILES)
    with hub_access(known.hf_hub_id, files):
        yield


def embed(vit: Any, pixels_B3SS: Tensor) -> Tensor:
    """Tokens (B, P + N, D) that enter block 0: P prefix tokens, then the patches row by row. Of a
    ``TokenNetwork``, which has no blocks, its output."""
    if isinstance(vit, TokenNetwork):
        return vit(pixels_B3SS)
    tokens = vit._pos_embed(vit.patch_embed(pixels_B3SS))
    if isinstance(tokens, tuple):  # Eva also returns its rotary embedding
        tokens = tokens[0]
    return vit.norm_pre(tokens)


def block_arguments(vit: Any) -> list[dict[str, Tensor]]:
    """Arguments of each block besides its tokens: rotary embeddings, in models that have them.

    They depend only on the patch grid and, where learnt, on weights, so blocks can run without the
    embedding of the image.
    """
    if getattr(vit, "rope", None) is None:
        return [{}] * len(vit.blocks)
    rope = vit.rope.get_embed(shape=vit.patch_embed.grid_size)
    if vit.rope_mixed:  # one per block
        return [{"rope": one} for one in rope]
    return [{"rope": rope}] * len(vit.blocks)


def final_norm(vit: Any) -> nn.Module:
    """The norm after the last block. Models with average pooling have it after the pooling (timm's
    ``fc_norm``); here it is applied to the tokens instead of their mean."""
    for norm in (vit.norm, vit.fc_norm):
        if not isinstance(norm, nn.Identity):
            return norm
    return nn.Identity()


def _sizes(
    config: TeacherConfig, resolution: int, tapped: bool
) -> tuple[VitShape, int, TokenGrid | None]:
    """Shape of the model, pixels per side of its input, and the grid of a model that cannot be
    tapped, which is refused if ``tapped``. Raises ``UserError``."""
    with torch.device("meta"), _NoInitialisation():
        vit = _create(config)
    try:
        shape = _tappable_shape(vit, config.model)
    except UserError:
        if tapped or not isinstance(vit, FAMILIES):
            raise
        return _token_sizes(config, resolution, vit)
    patch = vit.patch_embed.feat_ratio()
    return shape, _input_size(config, resolution, patch), None


def _token_sizes(
    config: TeacherConfig, resolution: int, vit: Any
) -> tuple[VitShape, int, TokenGrid]:
    """``_sizes`` of a model of ``FAMILIES`` on the meta device, at timm's size of its input."""
    usual = int(vit.pretrained_cfg["input_size"][-1])
    patch = usual // find_grid(vit, usual, config.model).grid_size[0]
    size = _input_size(config, resolution, patch)
    with torch.device("meta"), _NoInitialisation():
        grid = find_grid(_create(config, img_size=size), size, config.model)
    heads = int(getattr(getattr(vit.blocks[0], "attn", None), "num_heads", 1))
    heads = heads if grid.width % heads == 0 else 1
    return VitShape(len(vit.blocks), heads, grid.width // heads), size, grid


def _input_size(config: TeacherConfig, resolution: int, patch: int) -> int:
    """Pixels per side of the teacher's input. Raises ``UserError``."""
    size = config.image_size or resolution // PIXELS_PER_TOKEN * patch
    if size < patch or size % patch:
        raise UserError(
            f"--teacher.image-size {size} is not a multiple of the teacher's patch size {patch}"
        )
    return int(size)


def _download(config: TeacherConfig, size: int) -> Any:
    """The model with timm's weights, from the hub or its local cache. Raises ``UserError``."""
    try:
        with weights_access(config.model):
            return _create(config, img_size=size, pretrained=True)
    except HubUnreachableError as error:
        raise UserError(
            f"--teacher.model '{config.model}': its file {error}; give --teacher.weights FILE, a "
            "cache folder that has it (HF_HUB_CACHE), or, for a test, --teacher.weights random"
        ) from None


def _create(config: TeacherConfig, **kwargs: Any) -> Any:
    try:
        return timm.create_model(config.model, num_classes=0, **{**config.model_args, **kwargs})
    except Exception as error:  # a model's constructor may raise any type
        reason = plain_text(str(error))[:200] or type(error).__name__
        raise UserError(f"--teacher.model '{config.model}': {reason}") from None


def _tappable_shape(vit: Any, name: str) -> VitShape:
    """Shape of a model on the meta device. Raises ``UserError`` if its attention cannot be read."""
    if not isinstance(vit, VisionTransformer | Eva):
        raise UserError(
            f"--teacher.model '{name}': the attention of a {type(vit).__name__} cannot be "
            "tapped; use a plain vision transformer (DINOv2, DINOv3, CLIP, MAE, SigLIP, ...), or "
            "store the features of one alone with --layers none"
        )
    _fuse_attention(vit)
    tokens = vit.num_prefix_tokens + vit.patch_embed.num_patches
    with AttentionTap() as tap:
        vit.blocks[0](
            torch.empty(1, tokens, vit.embed_dim, device="meta"), **block_arguments(vit)[0]
        )
    if len(tap.calls) != 1 or not tap.calls[0].plain:
        kind = type(vit.blocks[0]).__name__
        raise UserError(
            f"--teacher.model '{name}': its blocks ({kind}) do not have one plain attention each "
            "and cannot be tapped; use another vision transformer, or store features alone with "
            "--layers none"
        )
    _, heads, _, head_width = tap.calls[0].q.shape
    return VitShape(len(vit.blocks), int(heads), int(head_width))


def _fuse_attention(vit: Any) -> None:
    """Use fused attention independently of timm's environment variables, because taps read the
    fused call and no environment variable may change numbers."""
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
