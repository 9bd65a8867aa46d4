"""Resample student tensors to the teacher's token grid (HASTE appendix A.3).

Bilinear, without antialiasing, pixel centres aligned (not corners), for up- and downsampling.
If the grids are equal, the same tensor is returned.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of tokens; token r * columns + c is at row r, column c."""


def resample_features(features_BND: Tensor, source: Grid, target: Grid) -> Tensor:
    """(B, N, D) on the source grid to (B, M, D) on the target grid."""
    if source == target:
        return features_BND
    return _resample(features_BND.transpose(1, 2), source, target).transpose(1, 2)


def resample_logits(logits_BLHNN: Tensor, source: Grid, target: Grid) -> Tensor:
    """Attention logits (B, L, H, N, N) to (B, L, H, M, M): each query's map over the keys, then
    each key's map over the queries. The softmax comes after."""
    if source == target:
        return logits_BLHNN
    logits = _resample(logits_BLHNN.flatten(0, 2), source, target)
    logits = _resample(logits.transpose(1, 2), source, target).transpose(1, 2)
    return logits.unflatten(0, logits_BLHNN.shape[:3])


def _resample(maps_BCN: Tensor, source: Grid, target: Grid) -> Tensor:
    """C maps (B, C, N) on the source grid to (B, C, M) on the target grid."""
    images = maps_BCN.unflatten(2, source)
    return F.interpolate(images, size=target, mode="bilinear", align_corners=False).flatten(2)
