"""Projection of student tokens to the teacher's feature space."""

from __future__ import annotations

from torch import Tensor, nn

from schemas.alignment import StreamAlignment


class Projector(nn.Sequential):
    """Three linear layers with SiLU between (REPA, arXiv 2410.06940; HASTE appendix B)."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, out),
        )
        for module in self:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features_BND: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, out)."""
        return super().forward(features_BND)


class ConvProjector(nn.Conv2d):
    """One convolution over the grid of tokens, zeros around it (iREPA, arXiv 2512.10794, section
    4.1). Its initialisation is PyTorch's, as in the authors' code."""

    def __init__(self, width: int, kernel: int, out: int, grid: tuple[int, int]) -> None:
        """``grid``: rows and columns of the tokens."""
        super().__init__(width, out, kernel, padding=kernel // 2)
        self.grid = grid

    def forward(self, features_BND: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, out); token r * columns + c is at row r, column c."""
        maps_BDhw = features_BND.transpose(1, 2).unflatten(2, self.grid)
        return super().forward(maps_BDhw).flatten(2).transpose(1, 2)


def make_projector(
    options: StreamAlignment, width: int, out: int, grid: tuple[int, int]
) -> nn.Module:
    """The projector of a stream, newly initialised, from ``width`` of the student to ``out`` of the
    teacher, whose tokens form ``grid``."""
    if options.projector == "conv":
        assert options.projector_kernel is not None
        return ConvProjector(width, options.projector_kernel, out, grid)
    return Projector(width, options.projector_width, out)
