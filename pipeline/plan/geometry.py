"""The sizes that bytes and FLOPs follow from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """A teacher at the size at which it sees the images of a data set."""

    tokens: int
    """Class and register tokens included."""
    patches: int
    """Tokens of the image alone, N."""
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
    def first_tapped(self) -> int:
        """The block at whose entrance the cut ``activations`` lies."""
        return self.layers[0]
