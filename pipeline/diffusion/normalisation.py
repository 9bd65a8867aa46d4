"""Normalisation of latents: what a student sees of an autoencoder's latents, and the way back.

Students see (z - shift_factor) * scaling_factor, or with statistics of each channel
(z - latents_mean) * scaling_factor / latents_std, as in diffusers' pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schemas.errors import UserError
from schemas.networks import AutoencoderInfo

Statistics = tuple[float, ...]


class Normalisation(NamedTuple):
    """Numbers of one autoencoder; the fields of ``AutoencoderInfo`` with these names."""

    scaling_factor: float
    shift_factor: float = 0.0
    latents_mean: Statistics | None = None
    """One number per channel of the latent."""
    latents_std: Statistics | None = None


def normalisation_of(info: AutoencoderInfo) -> Normalisation:
    """That of a manifest or checkpoint."""
    return Normalisation(
        info.scaling_factor, info.shift_factor, info.latents_mean, info.latents_std
    )


def read_normalisation(config: Mapping[str, Any], channels: int, where: str) -> Normalisation:
    """That of a diffusers config. Raises ``UserError``, which begins with ``where``, for numbers
    that cannot be used and where there are none."""
    mean, std = (
        _statistics(config, key, channels, where) for key in ("latents_mean", "latents_std")
    )
    scaling, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
    if (mean is None) != (std is None):
        raise UserError(f"{where}: has only one of latents_mean and latents_std")
    if scaling is None and mean is None:
        raise UserError(
            f"{where}: has neither scaling_factor nor latents_mean and latents_std, so the scale "
            "of its latents is not known; write them into its config.json"
        )
    if mean is not None and shift:
        raise UserError(f"{where}: has both latents_mean and shift_factor; keep one of them")
    try:
        factors = 1.0 if scaling is None else float(scaling), float(shift)
    except (TypeError, ValueError):
        factors = math.nan, math.nan
    if not (0 < factors[0] < math.inf and math.isfinite(factors[1])):
        raise UserError(
            f"{where}: scaling_factor is {scaling} and shift_factor {shift}; expected a number "
            "above 0 and a finite one"
        )
    return Normalisation(*factors, mean, std)


def normalise(latents_BChw: Tensor, by: Normalisation) -> Tensor:
    """Latents of an autoencoder as a student sees them."""
    if by.latents_mean is None or by.latents_std is None:
        return (latents_BChw - by.shift_factor) * by.scaling_factor
    mean, std = (_per_channel(s, latents_BChw.device) for s in (by.latents_mean, by.latents_std))
    return (latents_BChw - mean) * by.scaling_factor / std


def denormalise(latents_BChw: Tensor, by: Normalisation) -> Tensor:
    """The inverse of ``normalise``."""
    if by.latents_mean is None or by.latents_std is None:
        return latents_BChw / by.scaling_factor + by.shift_factor
    mean, std = (_per_channel(s, latents_BChw.device) for s in (by.latents_mean, by.latents_std))
    return latents_BChw * std / by.scaling_factor + mean


@lru_cache(maxsize=8)  # made once, because a copy to a device waits for it
def _per_channel(values: Statistics, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def _statistics(
    config: Mapping[str, Any], key: str, channels: int, where: str
) -> Statistics | None:
    values = config.get(key)
    if values is None:
        return None
    try:
        numbers = torch.tensor(values, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{where}: {key} is not a list of numbers") from None
    if len(numbers) != channels or not numbers.isfinite().all():
        raise UserError(
            f"{where}: {key} has {len(numbers)} numbers; expected {channels} finite ones, one for "
            "each channel of its latents"
        )
    if key == "latents_std" and not (numbers > 0).all():
        raise UserError(f"{where}: {key} has numbers that are not above 0")
    return tuple(numbers.tolist())
