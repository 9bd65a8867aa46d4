"""SiT, the scalable interpolant transformer (arXiv 2401.08740), with taps.

Parameter names are those of the SiT, REPA and HASTE repositories, so that their checkpoints load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.models.layers import (
    Attention,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    initialise,
    modulate,
    position_table,
    unpatchify,
)
from pipeline.models.taps import QueriesKeys, StudentOutput, Taps
from schemas.diffusion import Convention
from schemas.student import StudentConfig

NO_TAPS = Taps()


class SiT(nn.Module):
    """Predicts the velocity of a noisy latent, given its time and class.

    With ``config.class_token`` it also denoises a class token of the teacher (REG, arXiv
    2507.01467): one more token, at index 0, whose row of the position table is 0.

    ``convention`` says how samplers must read the output of weights from other repositories.
    ``null_label`` is the label for "no class", None where the weights know no such label.
    """

    pos_embed: Tensor
    parts = 1
    """Number of predicted tensors of the latent's shape."""

    def __init__(
        self,
        config: StudentConfig,
        *,
        convention: Convention | None = None,
        null_row: bool = True,
        qk_norm: bool = False,
    ) -> None:
        """``null_row`` and ``qk_norm``: see ``LabelEmbedder`` and ``Attention``."""
        super().__init__()
        self.config = config
        self.convention = convention or Convention()
        self.null_label = config.num_classes if null_row else None
        size = config.size
        grid = config.latent_size // size.patch_size
        self.patch_size = size.patch_size
        self.grid = (grid, grid)
        self.x_embedder = PatchEmbed(size.patch_size, config.latent_channels, size.width)
        self.t_embedder = TimestepEmbedder(size.width)
        self.y_embedder = LabelEmbedder(config.num_classes, size.width, null_row=null_row)
        table = position_table(size.width, grid, grid)
        if config.class_token is not None:
            table = torch.cat([torch.zeros(1, 1, size.width), table], dim=1)
        self.register_buffer("pos_embed", table)
        self.blocks = nn.ModuleList(
            Block(size.width, size.heads, qk_norm=qk_norm) for _ in range(size.depth)
        )
        self.final_layer = FinalLayer(
            size.width,
            size.patch_size,
            self.parts * config.latent_channels,
            config.class_token,
        )
        if config.class_token is not None:  # named and placed as in the authors' files
            self.cls_projectors2 = nn.Linear(config.class_token, size.width)
            self.wg_norm = nn.LayerNorm(size.width, eps=1e-6)
        initialise(self)

    def forward(
        self,
        x_BChw: Tensor,
        t_B: Tensor,
        y_B: Tensor,
        taps: Taps = NO_TAPS,
        class_token_BE: Tensor | None = None,
    ) -> StudentOutput:
        """Velocity at ``x`` (B, C, h, w), times ``t`` in [0, 1] and labels ``y``
        (``num_classes`` is "no class"). Raises ``ValueError`` unless a noisy class token is given
        exactly to a student that has one."""
        has_class_token = self.config.class_token is not None
        if has_class_token != (class_token_BE is not None):
            raise ValueError("a class token goes with student.class_token, and only with it")
        x = self.x_embedder(x_BChw)
        if class_token_BE is not None:
            class_token = self.wg_norm(self.cls_projectors2(class_token_BE))
            x = torch.cat([class_token.unsqueeze(1), x], dim=1)
        x = x + self.pos_embed
        c = self.t_embedder(t_B) + self.y_embedder(y_B)
        features = None
        attended, others = [], []
        for number, block in enumerate(self.blocks):
            heads = taps.heads if number in taps.attention_layers else 0
            assert isinstance(block, Block)
            # not an argument: the compiler makes integers symbolic that differ between calls
            block.tapped_heads = heads
            x, operands = block(x, c)
            if operands is not None:
                attended.append(operands.patches() if has_class_token else operands)
            if number + 1 == taps.feature_depth:
                features = x
            if number + 1 in taps.other_depths:
                others.append(x)
        patches, class_prediction = self.final_layer(x, c)
        prediction = unpatchify(patches, self.grid, self.patch_size)
        return StudentOutput(prediction, features, tuple(attended), tuple(others), class_prediction)


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning."""

    tapped_heads = 0
    """Number of heads, from the first, whose queries and keys are returned; 0: None instead."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> tuple[Tensor, QueriesKeys | None]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        out, attended = self.attn(modulate(self.norm1(x_BND), shift1, scale1), self.tapped_heads)
        x = x_BND + gate1.unsqueeze(1) * out
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x, attended


class DiT(SiT):
    """DiT (arXiv 2212.09748): predicts the noise and the variance of the reverse step,
    (B, 2 C, h, w).

    The time is an integer timestep, 0 to 999. Parameter names are those of the DiT repository.
    """

    parts = 2
