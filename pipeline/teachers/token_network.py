"""timm's vision transformers whose attention cannot be read: pixels in, tokens out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.tnt import TNT
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from timm.models.xcit import Xcit
from torch import Tensor, nn

from schemas.errors import UserError

FAMILIES = (
    VisionTransformer,
    Eva,
    Beit,
    VisionTransformerSAM,
    VisionTransformerRelPos,
    NaFlexVit,
    Cait,
    ConVit,
    TNT,
    Xcit,
)
"""Classes whose output is one square grid of tokens, with class and register tokens before it."""


class TokenGrid(NamedTuple):
    """The part of timm's patch embedding that a teacher asks for."""

    img_size: tuple[int, int]
    grid_size: tuple[int, int]
    width: int
    """Numbers of one token."""


class TokenNetwork(nn.Module):
    """A model of ``FAMILIES`` as one piece, whose blocks are neither run one by one nor tapped.
    Attributes are named as those of timm's ``VisionTransformer``."""

    def __init__(self, network: Any, grid: TokenGrid) -> None:
        super().__init__()
        self.network = network
        self.patch_embed = grid
        self.embed_dim = grid.width
        self.blocks = nn.ModuleList()
        self.norm = nn.Identity()
        normed = not isinstance(getattr(network, "norm", None), nn.Identity)
        # of models with average pooling, applied to the tokens instead of their mean
        self.fc_norm = nn.Identity() if normed else network.fc_norm
        self.pretrained_cfg = network.pretrained_cfg
        self.num_prefix_tokens = prefix_tokens(network)
        owner = getattr(network, "embeds", network)  # NaFlexVit's
        self.cls_token = getattr(owner, "cls_token", None)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Under timm's own names."""
        return self.network.state_dict(*args, **kwargs)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        return output_tokens(self.network, pixels_B3SS)


def prefix_tokens(network: Any) -> int:
    """Number of class and register tokens."""
    return int(getattr(network, "num_prefix_tokens", 0) or 0)


def output_tokens(network: Any, pixels_B3SS: Tensor) -> Tensor:
    """Output (B, P + N, D) of timm's ``forward_features``; a map (B, D, h, w), which SAM's neck
    gives, row by row."""
    tokens: Tensor = network.forward_features(pixels_B3SS)
    return tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens


@torch.no_grad()
def find_grid(network: Any, size: int, name: str) -> TokenGrid:
    """The output's grid, of a model on the meta device with inputs of ``size`` pixels per side.
    Raises ``UserError`` where it is not a square grid of tokens."""
    try:
        tokens = output_tokens(network.eval(), torch.empty(1, 3, size, size, device="meta"))
    except Exception as error:  # a model may raise any type
        raise UserError(
            f"--teacher.model '{name}' cannot take {size} x {size} pixels: {str(error)[:200]}"
        ) from None
    count = tokens.shape[1] - prefix_tokens(network)
    side = math.isqrt(max(0, count))
    if tokens.ndim != 3 or side < 1 or side * side != count or size % side:
        raise UserError(
            f"--teacher.model '{name}' gives {tuple(tokens.shape[1:])} for {size} x {size} pixels, "
            "which is not a square grid of tokens; use another vision transformer"
        )
    return TokenGrid((size, size), (side, side), int(tokens.shape[2]))
