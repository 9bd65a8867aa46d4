"""The sizes that bytes and FLOPs follow from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """A teacher at the size at which it sees the images of a data set."""

    prefix: int
    """Class and register tokens."""
    grid: tuple[int, int]
    """Patch tokens, rows x columns."""
    width: int
    heads: int
    head_width: int
    depth: int
    layers: tuple[int, ...]
    """Layers whose attention a store keeps, 0-based, lowest first."""
    resolution: int
    """Pixels per side of the crop."""
    latent_shape: tuple[int, int, int]
    """Channels, rows, columns."""

    @property
    def patches(self) -> int:
        """Tokens of the image alone, N."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Class and register tokens included."""
        return self.prefix + self.patches

    @property
    def first_tapped(self) -> int:
        """The block at whose entrance the cut ``activations`` lies."""
        return self.layers[0]
