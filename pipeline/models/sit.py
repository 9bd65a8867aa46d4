"""SiT, the scalable interpolant transformer (arXiv 2401.08740), with taps.

Parameter names are those of the SiT, REPA and HASTE repositories, so that their checkpoints load.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pipeline.models.layers import (
    Attention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    modulate,
    position_table,
)
from pipeline.models.taps import StudentOutput, Taps
from schemas.student import StudentConfig

NO_TAPS = Taps()


class SiT(nn.Module):
    """Predicts the velocity of a noisy latent, given its time and class."""

    pos_embed: Tensor

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        size = config.size
        grid = config.latent_size // size.patch_size
        self.patch_size = size.patch_size
        self.grid = (grid, grid)
        self.x_embedder = PatchEmbed(size.patch_size, config.latent_channels, size.width)
        self.t_embedder = TimestepEmbedder(size.width)
        self.y_embedder = LabelEmbedder(config.num_classes, size.width)
        self.register_buffer("pos_embed", position_table(size.width, grid, grid))
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))
        self.final_layer = FinalLayer(size.width, size.patch_size, config.latent_channels)
        self.initialise()

    def initialise(self) -> None:
        """The initialisation of SiT and DiT: every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
        nn.init.constant_(cast(Tensor, patch.bias), 0)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(cast(nn.Linear, layer).weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                modulation = cast(nn.Linear, module.adaLN_modulation[1])
                nn.init.zeros_(modulation.weight)
                nn.init.zeros_(modulation.bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def forward(
        self, x_BChw: Tensor, t_B: Tensor, y_B: Tensor, taps: Taps = NO_TAPS
    ) -> StudentOutput:
        """Velocity at ``x`` (B, C, h, w), times ``t`` in [0, 1] and labels ``y``
        (``num_classes`` is "no class")."""
        x = self.x_embedder(x_BChw) + self.pos_embed
        c = self.t_embedder(t_B) + self.y_embedder(y_B)
        features = None
        logits = []
        for number, block in enumerate(self.blocks):
            heads = taps.heads if number in taps.attention_layers else 0
            x, block_logits = block(x, c, heads)
            if block_logits is not None:
                logits.append(block_logits)
            if number + 1 == taps.feature_depth:
                features = x
        velocity = self.unpatchify(self.final_layer(x, c))
        return StudentOutput(velocity, features, torch.stack(logits, dim=1) if logits else None)

    def unpatchify(self, x_BNP: Tensor) -> Tensor:
        """(B, N, patch * patch * C) -> (B, C, h, w)."""
        (rows, columns), p = self.grid, self.patch_size
        x = x_BNP.unflatten(1, (rows, columns)).unflatten(3, (p, p, -1))
        return torch.einsum("nhwpqc->nchpwq", x).flatten(4, 5).flatten(2, 3)


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x_BND: Tensor, c_BD: Tensor, tapped_heads: int
    ) -> tuple[Tensor, Tensor | None]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        out, logits = self.attn(modulate(self.norm1(x_BND), shift1, scale1), tapped_heads)
        x = x_BND + gate1.unsqueeze(1) * out
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x, logits


class FinalLayer(nn.Module):
    """Modulated norm and the linear map to patches."""

    def __init__(self, width: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BND), shift, scale))
