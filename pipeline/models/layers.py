"""Layers shared by the diffusion transformers: embeddings, attention, MLP and initialisation."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.taps import QueriesKeys


class Attention(nn.Module):
    """Multi-head self-attention that can also return queries and keys of its first heads."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False) -> None:
        """``qk_norm``: queries and keys of each head are layer-normalised (REPA's option)."""
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, tapped_heads: int = 0) -> tuple[Tensor, QueriesKeys | None]:
        """Output (B, N, D), and queries and keys of the first ``tapped_heads``; None for 0.

        The output always comes from the fused kernel, never from explicit logits.
        """
        q, k, v = split_heads(self.qkv(x_BND), self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(out), first_heads(q, k, tapped_heads)


def split_heads(qkv_BNE: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 H d) in the order q, k, v to queries, keys and values, each (B, H, N, d)."""
    q, k, v = qkv_BNE.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def first_heads(q_BHNd: Tensor, k_BHNd: Tensor, heads: int) -> QueriesKeys | None:
    """Queries and keys of the first ``heads`` heads; None for 0."""
    return QueriesKeys(q_BHNd[:, :heads], k_BHNd[:, :heads]) if heads else None


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PatchEmbed(nn.Module):
    """Non-overlapping patches of a latent to tokens, row by row."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, D)."""
        return self.proj(x_BChw).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sine and cosine features of t in [0, 1] (unscaled, as in SiT) through a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        return self.mlp(sinusoid(t_B, self.frequencies))


class LabelEmbedder(nn.Module):
    """Embedding table with one row per class and, with ``null_row``, a last row for "no class"."""

    def __init__(self, num_classes: int, width: int, *, null_row: bool = True) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_row, width)

    def forward(self, y_B: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        return self.embedding_table(y_B)


class FinalLayer(nn.Module):
    """Modulated norm and the linear map to patches; with ``class_token``, the width of the class
    token at index 0, a second map for that token (REG, arXiv 2507.01467)."""

    def __init__(
        self, width: int, patch_size: int, channels: int, class_token: int | None = None
    ) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.linear_cls = None if class_token is None else nn.Linear(width, class_token)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Numbers of each patch (B, patches, P), and of the class token (B, E) if there is one."""
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        x = modulate(self.norm_final(x_BND), shift, scale)
        if self.linear_cls is None:
            return self.linear(x), None
        return self.linear(x[:, 1:]), self.linear_cls(x[:, 0])


def sinusoid(t_B: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of t at geometric frequencies: (B, dim), float32 (GLIDE's form)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angles = t_B[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def position_table(width: int, rows: int, columns: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding (MAE's form): (1, rows * columns, width), float32.

    The first half of the width encodes the column, the second the row; computed in float64.
    """
    if width % 4:
        raise ValueError(f"width {width} is not a multiple of 4")
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    halves = []
    for position in (column, row):
        angles = position.reshape(-1, 1) * frequencies
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float().unsqueeze(0)


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x (1 + scale) + shift, per sample."""
    return x_BND * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


def unpatchify(x_BNP: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Tokens of patch * patch * C numbers, channels fastest, to (B, C, h, w)."""
    x = x_BNP.unflatten(1, grid).unflatten(3, (patch_size, patch_size, -1))
    return torch.einsum("nhwpqc->nchpwq", x).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Initialisation of DiT and SiT: every block starts as the identity, the output as 0."""
    parts = list(model.modules())
    for part in parts:
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
    for part in parts:
        if isinstance(part, PatchEmbed):
            nn.init.xavier_uniform_(part.proj.weight.flatten(1))
            nn.init.zeros_(cast(Tensor, part.proj.bias))
        elif isinstance(part, LabelEmbedder):
            nn.init.normal_(part.embedding_table.weight, std=0.02)
    for part in parts:
        if isinstance(part, TimestepEmbedder):
            for layer in (part.mlp[0], part.mlp[2]):
                nn.init.normal_(cast(nn.Linear, layer).weight, std=0.02)
        if hasattr(part, "adaLN_modulation"):
            modulation = cast(nn.Sequential, part.adaLN_modulation)
            last = cast(nn.Linear, modulation[-1])
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        if isinstance(part, FinalLayer):
            for head in (part.linear, part.linear_cls):
                if head is not None:
                    nn.init.zeros_(head.weight)
                    nn.init.zeros_(head.bias)
