"""Options of the text-to-image diffusion transformer."""

from __future__ import annotations

from pydantic import model_validator

from schemas.base import Strict
from schemas.student import Positive, StudentSize


class MMDiTConfig(Strict):
    """The MM-DiT that HASTE and REPA train on MS-COCO."""

    latent_size: Positive = 32
    """Rows and columns of the latent: 32 for 256 px images."""
    latent_channels: Positive = 4
    """Channels of the latent."""
    patch_size: Positive = 2
    """Rows and columns of the latent per token."""
    depth: Positive = 24
    """Joint blocks."""
    width: Positive = 768
    """Width of both streams."""
    heads: Positive = 24
    """Attention heads."""
    context_width: Positive = 768
    """Width of the text embeddings; 768 for CLIP-L."""

    @property
    def size(self) -> StudentSize:
        """The sizes in use."""
        return StudentSize(self.depth, self.width, self.heads, self.patch_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.latent_channels, self.latent_size, self.latent_size)

    @model_validator(mode="after")
    def _sizes_fit(self) -> MMDiTConfig:
        self.size.check(self.latent_size)
        return self
