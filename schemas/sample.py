"""The options of ``jobs/sample.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Strict
from schemas.diffusion import SamplerConfig
from schemas.fields import Layers
from schemas.student import ModelName


class SampleConfig(Strict):
    """Which pictures are drawn, and how."""

    checkpoint: str | None = None
    """A run's folder (its newest checkpoint is taken), one checkpoint's, or a .pt file of the SiT,
    REPA or HASTE repositories."""
    model: ModelName | None = None
    """What a .pt file holds, for example SiT-XL/2."""
    classes: Layers = (0,)
    """Class numbers, one row of the grid each: 1,2,3 or 0-9."""
    per_class: Annotated[int, Field(ge=1, le=1000)] = 8
    """Pictures of each class."""
    png: str | None = None
    """The picture file to write."""
    weights: Literal["ema", "model"] = "ema"
    """Averaged weights, or those of the last step."""
    autoencoder: str | None = None
    """Decoder: hub id or folder. Default: the one that encoded the store; for a .pt file
    stabilityai/sd-vae-ft-ema."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Pictures drawn at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    sampler: SamplerConfig = SamplerConfig()
