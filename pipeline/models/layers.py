"""Parts that the diffusion transformers share: embeddings and attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention; on request also the logits of its first heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, tapped_heads: int = 0) -> tuple[Tensor, Tensor | None]:
        """Output (B, N, D), and logits (B, tapped_heads, N, N) in float32 where asked for.

        The output never depends on the explicit logits: it comes from the fused kernel.
        """
        B, N, D = x_BND.shape
        qkv = self.qkv(x_BND).view(B, N, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        logits = attention_logits(q, k, tapped_heads) if tapped_heads else None
        return self.proj(out), logits


def attention_logits(q_BHNd: Tensor, k_BHNd: Tensor, heads: int) -> Tensor:
    """q k^T / sqrt(d) of the first ``heads`` heads: (B, heads, N, N), float32."""
    scale = q_BHNd.shape[-1] ** -0.5
    logits = (q_BHNd[:, :heads] * scale) @ k_BHNd[:, :heads].transpose(-2, -1)
    return logits.float()


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
    """A table with one row per class and one more, the last, for "no class"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y_B: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        return self.embedding_table(y_B)


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
    for place in (column, row):
        angles = place.reshape(-1, 1) * frequencies
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float().unsqueeze(0)


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x (1 + scale) + shift, per sample."""
    return x_BND * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)
