"""Projection of student tokens to the teacher's feature space."""

from __future__ import annotations

from torch import Tensor, nn


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
