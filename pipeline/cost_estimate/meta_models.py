"""Teacher and autoencoder on the meta device: shapes without weights and without network access."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import diffusers
import torch

from pipeline.assets import DEMO_AUTOENCODER
from pipeline.autoencoders.autoencoder import KINDS
from pipeline.pretrain.kl_autoencoder import create_autoencoder
from pipeline.pretrain.options import AutoencoderConfig
from pipeline.teachers.vit import create_meta_vit
from schemas.errors import UserError
from schemas.extract import ExtractConfig

STABLE_DIFFUSION: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""Sizes of Stable Diffusion's autoencoder, from the config of stabilityai/sd-vae-ft-mse."""


@dataclass(frozen=True)
class Geometry:
    """Shapes of a teacher at its input size, and of the latents."""

    prefix: int  # class and register tokens
    grid: tuple[int, int]  # patch tokens, rows x columns
    width: int
    heads: int
    head_width: int
    depth: int
    layers: tuple[int, ...]  # whose attention a store holds, 0-based, lowest first
    resolution: int  # pixels per side of the crop
    latent_shape: tuple[int, int, int]  # channels, rows, columns
    has_class_token: bool = True

    @property
    def patches(self) -> int:
        """Patch tokens, N."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Patch, class and register tokens."""
        return self.prefix + self.patches


class MetaModels(NamedTuple):
    """Networks of an extraction."""

    vit: Any  # timm model of the teacher
    autoencoder: Any  # diffusers model
    geometry: Geometry
    notes: tuple[str, ...]  # assumptions


def build_meta_models(config: ExtractConfig) -> MetaModels:
    """Teacher and autoencoder of an extraction. Raises ``UserError`` where they do not fit."""
    if not config.layers:
        raise UserError("--plan compares cuts by the attention of --layers, which are none")
    vit, shape = create_meta_vit(config.teacher, config.resolution)
    if max(config.layers) >= shape.depth:
        raise UserError(
            f"--layers asks for layer {max(config.layers)}; teacher '{config.teacher.model}' has "
            f"{shape.depth} layers, 0 to {shape.depth - 1}"
        )
    autoencoder, notes = _meta_autoencoder(config)
    geometry = Geometry(
        prefix=vit.num_prefix_tokens,
        grid=tuple(vit.patch_embed.grid_size),
        width=vit.embed_dim,
        heads=shape.heads,
        head_width=shape.head_width,
        depth=shape.depth,
        layers=config.layers,
        resolution=config.resolution,
        latent_shape=_latent_shape(autoencoder, config),
        has_class_token=vit.cls_token is not None,
    )
    return MetaModels(vit, autoencoder, geometry, notes)


def writes_class_stream(config: ExtractConfig, geometry: Geometry) -> bool:
    """True if the extraction writes class tokens, or the mean of patch tokens."""
    return config.class_token == "mean" or (
        config.class_token == "class" and geometry.has_class_token
    )


def encode(autoencoder: Any, pixels_B3RR: torch.Tensor) -> torch.Tensor:
    """Mean latents (B, C, h, w) of a variational or a deterministic autoencoder."""
    encoded = autoencoder.encode(pixels_B3RR)
    latents = getattr(encoded, "latents", None)
    return encoded.latent_dist.mean if latents is None else latents


def _meta_autoencoder(options: ExtractConfig) -> tuple[Any, tuple[str, ...]]:
    name, pretrain = options.autoencoder, options.pretrain
    source = str(DEMO_AUTOENCODER) if name == "demo" else name
    notes: tuple[str, ...] = ()
    try:
        config = diffusers.AutoencoderKL.load_config(source, local_files_only=True)
    except (OSError, ValueError):
        if pretrain is not None and pretrain.autoencoder_steps:
            with torch.device("meta"):
                model = create_autoencoder(
                    AutoencoderConfig(widths=pretrain.widths), options.resolution
                )
            return model, (f"autoencoder '{name}' is trained first, which is not counted here",)
        config = {"_class_name": "AutoencoderKL", **STABLE_DIFFUSION}
        if not name.startswith("stabilityai/sd-vae-"):
            notes = (f"autoencoder '{name}' is not on this machine: Stable Diffusion's is assumed",)
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise UserError(f"--autoencoder '{name}' is a {kind}; expected {' or '.join(KINDS)}")
    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(config), notes


@torch.no_grad()
def _latent_shape(autoencoder: Any, config: ExtractConfig) -> tuple[int, int, int]:
    size = config.resolution
    try:
        latents = encode(autoencoder, torch.empty(1, 3, size, size, device="meta"))
    except RuntimeError as error:
        raise UserError(
            f"--autoencoder '{config.autoencoder}' cannot encode {size} px images: {error}"
        ) from None
    return (latents.shape[1], latents.shape[2], latents.shape[3])
