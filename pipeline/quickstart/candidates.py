"""Networks to choose from: teachers, and students with the layers that are aligned."""

from __future__ import annotations

from typing import NamedTuple


class Teacher(NamedTuple):
    """A vision transformer."""

    model: str
    depth: int
    width: int
    heads: int
    patch: int

    def flops(self, grid: int) -> float:
        return transformer_flops(self.depth, self.width, grid**2 + 1)


class Student(NamedTuple):
    """A diffusion transformer and the layers that are aligned."""

    model: str
    depth: int
    width: int
    heads: int
    layers: tuple[int, ...]
    feature_depth: int
    images: int
    """Fewest images for it."""
    learning_rate: float


OWN_SMALL = Teacher("vit_small_patch14_dinov2.lvd142m", 6, 96, 6, 0)
OWN_LARGE = Teacher("vit_small_patch14_dinov2.lvd142m", 12, 384, 6, 0)
HUB_SMALL = Teacher("vit_small_patch14_dinov2.lvd142m", 12, 384, 6, 14)
HUB_BASE = Teacher("vit_base_patch14_dinov2.lvd142m", 12, 768, 12, 14)
CPU_STUDENTS = (
    Student("SiT-S/2", 6, 96, 6, (2, 3), 4, 0, 2e-3),
    Student("SiT-S/2", 8, 192, 6, (3, 4), 5, 0, 1e-3),
    Student("SiT-S/2", 12, 384, 6, (2, 3, 4), 5, 20_000, 5e-4),
)
GPU_STUDENTS = (
    Student("SiT-S/2", 12, 384, 6, (2, 3, 4), 5, 0, 3e-4),
    Student("SiT-B/2", 12, 768, 12, (2, 3, 4), 5, 10_000, 1e-4),
    Student("SiT-L/2", 24, 1024, 16, (4, 5, 6, 7), 8, 100_000, 1e-4),
    Student("SiT-XL/2", 28, 1152, 16, (4, 5, 6, 7), 8, 400_000, 1e-4),
)
ALIGNED = {
    (6, 2): (4, 5),
    (6, 3): (3, 4, 5),
    (12, 2): (9, 11),
    (12, 3): (7, 9, 11),
    (12, 4): (8, 9, 10, 11),
}
"""Teacher layers by the teacher's depth and the number of aligned student layers."""


def transformer_flops(depth: int, width: int, tokens: int) -> float:
    """FLOPs of a forward pass: 12 products of width x width for each token, and the attention's."""
    return 2.0 * depth * tokens * (12 * width**2 + 2 * tokens * width)
