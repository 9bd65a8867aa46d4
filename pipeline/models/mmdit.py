"""MM-DiT, the text-to-image transformer of Stable Diffusion 3 (arXiv 2403.03206), with taps.

Text and image tokens have separate weights and attend to each other in every block. Parameter names
are those of the REPA and HASTE repositories, so that their checkpoints load; as there, conditioning
uses the text tokens alone, without a pooled vector, and padding is attended to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.layers import (
    FinalLayer,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    first_heads,
    initialise,
    modulate,
    position_table,
    split_heads,
    unpatchify,
)
from pipeline.models.sit import NO_TAPS
from pipeline.models.taps import QueriesKeys, StudentOutput, Taps
from schemas.diffusion import Convention
from schemas.student import StudentConfig


class MMDiT(nn.Module):
    """Predicts the velocity of a noisy latent, given its time and a text.

    ``null_context`` (T, E) is the embedding of the empty caption, the input without a caption. It
    is part of the weights, because sampling from a checkpoint must not need the store.

    ``convention`` says how samplers must read the output. ``null_label`` is None for weights that
    were never trained without a caption: these cannot be guided.
    """

    pos_embed: Tensor
    null_context: Tensor

    def __init__(self, config: StudentConfig, *, convention: Convention | None = None) -> None:
        super().__init__()
        self.config = config
        self.convention = convention or Convention()
        self.null_label: int | None = 0
        size, (tokens, text_width) = config.size, config.text_shape
        self.grid = config.grid
        self.x_embedder = PatchEmbed(size.patch_size, config.latent_channels, size.width)
        self.t_embedder = TimestepEmbedder(size.width)
        self.context_embedder = nn.Linear(text_width, size.width)
        self.register_buffer("pos_embed", position_table(size.width, *self.grid))
        self.register_buffer("null_context", torch.zeros(tokens, text_width))
        self.joint_blocks = nn.ModuleList(
            JointBlock(size.width, size.heads, last=number == size.depth - 1)
            for number in range(size.depth)
        )
        self.final_layer = FinalLayer(size.width, size.patch_size, config.latent_channels)
        if config.initialisation == "zero":
            initialise(self)

    @property
    def blocks(self) -> nn.ModuleList:
        """The joint blocks, by the name that other students have for theirs."""
        return self.joint_blocks

    def forward(
        self, x_BChw: Tensor, t_B: Tensor, context_BTE: Tensor, taps: Taps = NO_TAPS
    ) -> StudentOutput:
        """Velocity at ``x`` (B, C, h, w), times ``t`` in [0, 1] and text embeddings (B, T, E).

        Taps read the image stream: its tokens, and its queries and keys, that is only the
        image-to-image part of the joint attention (HASTE section 3.3).
        """
        x = self.x_embedder(x_BChw) + self.pos_embed
        context = self.context_embedder(context_BTE)
        c = self.t_embedder(t_B)
        features = None
        attended, others = [], []
        for number, block in enumerate(self.joint_blocks):
            heads = taps.heads if number in taps.attention_layers else 0
            assert isinstance(block, JointBlock)
            # not an argument: the compiler makes integers symbolic that differ between calls
            block.tapped_heads = heads
            context, x, operands = block(context, x, c)
            if operands is not None:
                attended.append(operands)
            if number + 1 == taps.feature_depth:
                features = x
            if number + 1 in taps.other_depths:
                others.append(x)
        prediction = unpatchify(self.final_layer(x, c)[0], self.grid, self.config.size.patch_size)
        return StudentOutput(prediction, features, tuple(attended), tuple(others))


class JointBlock(nn.Module):
    """Joint attention over text and image tokens; other layers are separate for each stream."""

    tapped_heads = 0
    """Number of heads, from the first, whose queries and keys of the image tokens are returned; 0:
    None instead."""

    def __init__(self, width: int, heads: int, *, last: bool) -> None:
        """``last``: the text stream gives queries, keys and values only, as its output is not
        used."""
        super().__init__()
        self.heads = heads
        self.context_block: ModalityStream | KeyStream = (
            KeyStream(width) if last else ModalityStream(width)
        )
        self.x_block = ModalityStream(width)

    def forward(
        self, context_BTD: Tensor, x_BND: Tensor, c_BD: Tensor
    ) -> tuple[Tensor, Tensor, QueriesKeys | None]:
        """Text tokens, image tokens, and the image's queries and keys of the tapped heads."""
        text_qkv, text_rest = self.context_block.before(context_BTD, c_BD)
        image_qkv, image_rest = self.x_block.before(x_BND, c_BD)
        text, image = split_heads(text_qkv, self.heads), split_heads(image_qkv, self.heads)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, image, strict=True))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        text_out, image_out = out.split([context_BTD.shape[1], x_BND.shape[1]], dim=1)
        context = self.context_block.after(context_BTD, text_out, text_rest)
        x = self.x_block.after(x_BND, image_out, image_rest)
        return context, x, first_heads(image[0], image[1], self.tapped_heads)


Rest = tuple[Tensor, ...]
"""Modulations (B, D) that a stream needs after the attention."""


class KeyStream(nn.Module):
    """Text stream of the last block: modulated norm, queries, keys and values."""

    modulations = 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width)})
        modulation = nn.Linear(width, self.modulations * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def before(self, x_BND: Tensor, c_BD: Tensor) -> tuple[Tensor, Rest]:
        """(B, N, 3 D) queries, keys and values, and the remaining modulations for ``after``."""
        shift, scale, *rest = self.adaLN_modulation(c_BD).chunk(self.modulations, dim=1)
        return self.attn["qkv"](modulate(self.norm1(x_BND), shift, scale)), tuple(rest)

    def after(self, x_BND: Tensor, attended_BND: Tensor, rest: Rest) -> Tensor:
        return x_BND


class ModalityStream(KeyStream):
    """One modality's stream of a block with adaLN-Zero conditioning."""

    modulations = 6

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.attn["proj"] = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def after(self, x_BND: Tensor, attended_BND: Tensor, rest: Rest) -> Tensor:
        """Output tokens of the block (B, N, D)."""
        gate1, shift2, scale2, gate2 = rest
        x = x_BND + gate1.unsqueeze(1) * self.attn["proj"](attended_BND)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
